"""Cut a module that is nobody's model: a few rules say what its layers are.

torchrun --standalone --nproc-per-node 4 examples/own_module.py "kvp2 tp2"
python examples/own_module.py
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait


class SelfAttention(nn.Module):
    """Grouped-query attention, written as one would without any library."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.wq = nn.Linear(hidden, hidden)
        self.wkv = nn.ModuleList(nn.Linear(hidden, kv_heads * self.head_dim) for _ in "kv")
        self.wo = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attend causally: [batch, seq, hidden] -> [batch, seq, hidden]."""
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (w(x).view(batch, length, self.kv_heads, -1).transpose(1, 2) for w in self.wkv)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(o.transpose(1, 2).reshape(batch, length, -1))


class Model(nn.Module):
    """Two blocks of attention and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1001, 64)
        self.attention = nn.ModuleList(SelfAttention(64, heads=8, kv_heads=4) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(64, 170) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(170, 64) for _ in range(2))
        self.head = nn.Linear(64, 1001)

    def forward(self, ids: Tensor) -> Tensor:
        """Give logits: [batch, seq] -> [batch, seq, vocabulary]."""
        x = self.embedding(ids)
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attention(x)
            x = x + down(F.gelu(up(x)))
        return self.head(x)


RULES = {
    "embedding": "embedding_rowwise",
    "attention.*": plait.Attention(
        heads=8, kv_heads=4, head_dim=8, q="wq", k="wkv.0", v="wkv.1", o="wo",
        counts=(("heads", "heads"), ("kv_heads", "kv_heads")),
    ),
    "up.*": "colwise",
    "down.*": "rowwise",
    "head": "colwise_gather_output",
}  # fmt: skip

if __name__ == "__main__":
    world = plait.init()
    torch.manual_seed(0)
    whole = Model()
    plan = sys.argv[1] if len(sys.argv) > 1 else f"tp{world.size}"
    model = plait.parallelize(copy.deepcopy(whole), plan, rules=RULES)
    ids = torch.randint(0, 1001, (2, 33))
    world.print(model)
    world.print(f"largest difference from one process: {(model(ids) - whole(ids)).abs().max():.1e}")
    world.close()
