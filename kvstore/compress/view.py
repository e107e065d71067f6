"""What a scorer may look at: one layer's keys, values and last queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cuda_kernels import attention_mass
from .rotary import Rotary

SCORE_ELEMENTS = 1 << 24  # rows of attention computed at once: 64 MiB of float32


@dataclass(frozen=True)
class LayerView:
    """One attention layer as a scorer sees it. Rows of a batch are equally long and have no padding.

    Shape:
        k `[batch, kv_heads, tokens, head_dim]` as cached (rotated), v likewise with value_dim;
        q `[batch, heads, queries, head_dim]`: the last queries, rotated, of the last of the tokens;
        positions `[tokens]`: where each token stood in the text, ascending;
        received `[batch, kv_heads, tokens]`: attention from all queries so far, the group's mean;
        output `[hidden, heads * value_dim]`: the weight of the output projection.

    Attributes:
        first_head, all_kv_heads: which KV heads of the layer these are: a rank, or a head that keeps tokens of its
            own, shows some of them.
    """

    k: Tensor
    v: Tensor
    q: Tensor | None = None
    positions: Tensor | None = None
    layer: int = 0
    layers: int = 1
    rotary: Rotary | None = None
    output: Tensor | None = None
    received: Tensor | None = None
    first_head: int = 0
    all_kv_heads: int = 0

    def __post_init__(self) -> None:
        if not self.all_kv_heads:
            object.__setattr__(self, "all_kv_heads", self.first_head + self.kv_heads)

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.k.shape[2]

    @property
    def kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.k.shape[1]

    def last_queries(self, count: int, who: str, fewer: bool = False) -> Tensor:
        """The last `count` queries, or fewer where there are fewer tokens.

        Args:
            fewer: make do with those there are: a later turn brings its own queries only.

        Raises:
            ValueError: if they were not kept.
        """
        need, kept = min(count, self.tokens), 0 if self.q is None else self.q.shape[2]
        if fewer and kept:
            need = min(need, kept)
        if self.q is None or kept < need:
            raise ValueError(
                f"{who} scores by the last {need} queries and {kept} were kept; "
                "compress right after the prompt's forward, or use a scorer of keys such as knorm"
            )
        return self.q[:, :, self.q.shape[2] - need :]


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """See query heads by the KV head they read: [batch, heads, ...] -> [batch, kv_heads, group, ...]."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def attention_rows(view: LayerView, q: Tensor) -> Tensor:
    """Attention weights of the last queries, in float32, causal among themselves.

    Shape: q `[batch, heads, n, head_dim]` -> `[batch, kv_heads, group, n, tokens]`
    """
    n, tokens = q.shape[2], view.tokens
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = grouped(q, view.kv_heads).to(wide)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", rows, view.k.to(wide)) * q.shape[-1] ** -0.5
    own = torch.arange(tokens - n, tokens, device=q.device)
    later = torch.arange(tokens, device=q.device) > own[:, None]
    return logits.masked_fill(later, float("-inf")).softmax(-1)


def attention_received(view: LayerView, q: Tensor) -> Tensor:
    """Attention that each token received from the last queries, summed over them and their group.

    Shape: q `[batch, heads, n, head_dim]` -> `[batch, kv_heads, tokens]`, float32 or float64
    """
    n, tokens = q.shape[2], view.tokens
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = grouped(q, view.kv_heads).to(wide).flatten(2, 3)  # [batch, kv_heads, group * n, d]
    seen = torch.arange(tokens - n + 1, tokens + 1).repeat(rows.shape[2] // n)
    pairs = zip(rows, view.k, strict=True)
    return torch.stack([attention_mass(own, k, seen, q.shape[-1] ** -0.5) for own, k in pairs])


def attention_columns(view: LayerView, q: Tensor) -> Tensor:
    """Attention that each token received from the last queries, summed in float32.

    The whole score matrix never exists: queries pass in runs.

    Shape: q `[batch, heads, n, head_dim]` -> `[batch, kv_heads, group, tokens]`
    """
    batch, heads, n, _ = q.shape
    step = max(1, SCORE_ELEMENTS // (batch * heads * view.tokens))
    total: Tensor | None = None
    for start in range(0, n, step):
        stop = min(start + step, n)
        seen = view.tokens - n + stop
        part = attention_rows(
            LayerView(k=view.k[:, :, :seen], v=view.v[:, :, :seen]), q[:, :, start:stop]
        ).sum(3)
        part = torch.nn.functional.pad(part, (0, view.tokens - seen))
        total = part if total is None else total + part
    assert total is not None
    return total
