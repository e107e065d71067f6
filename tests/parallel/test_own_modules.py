"""Modules that are nobody's model: rules, roles, and Helix through scaled_dot_product_attention."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import far, gradient_error
from plait.parallel import Attention, Plan, PlanError, modules, parallelize, unparallelize
from plait.parallel.api import prepare
from plait.parallel.folding import Folding
from plait.parallel.groups import Groups
from world import run_world

EXACT = 1e-9


class SelfAttention(nn.Module):
    """Attention as users write it. ``bias`` is none (causal), "alibi", or "window"."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, bias: str | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, self.bias = heads, kv_heads, hidden // heads, bias
        self.first_head = 0
        self.wq, self.wo = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.wk, self.wv = (nn.Linear(hidden, kv_heads * self.width) for _ in "kv")

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        turn = torch.arange(1, length + 1, dtype=x.dtype)[
            :, None, None
        ].cos()  # position dependent: keys are told apart
        q = (self.wq(x).view(batch, length, self.heads, -1) * turn).transpose(1, 2)
        k = (self.wk(x).view(batch, length, self.kv_heads, -1) * turn).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        mask = None if self.bias is None else self._mask(length, x.dtype)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.wo(o.transpose(1, 2).reshape(batch, length, -1))

    def _mask(self, length: int, dtype: torch.dtype) -> Tensor:
        at = torch.arange(length)
        back = at[:, None] - at[None, :]
        if self.bias == "window":
            return (back >= 0) & (back < 4)
        slopes = 2.0 ** -(1 + self.first_head + torch.arange(self.heads, dtype=dtype))
        return (-back * slopes[:, None, None]).masked_fill(back < 0, float("-inf"))


class Model(nn.Module):
    """Two pre-norm blocks written flat, with a tied head."""

    def __init__(self, bias: str | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(4))
        self.attention = nn.ModuleList(SelfAttention(32, 8, 4, bias) for _ in range(2))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*s) for _ in range(2)) for s in ((32, 50), (50, 32))
        )
        self.head = nn.Linear(32, 37, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x)


RULES = {
    "embedding": "embedding_rowwise",
    "attention.*": Attention(
        heads=8, kv_heads=4, head_dim=4, q="wq", k="wk", v="wv", o="wo",
        counts=(("heads", "heads"), ("kv_heads", "kv_heads")),
    ),
    "up.*": "colwise",
    "down.*": "rowwise",
    "head": "colwise_gather_output",
}  # fmt: skip


@dataclass
class Pair:
    reference: Any
    model: Any


def errors(plan: str, bias: str | None, length: int) -> dict[str, float]:
    """Relative errors of logits, gradients and the undone model on this rank."""
    torch.manual_seed(0)
    reference = Model(bias).double()
    pair = Pair(reference, parallelize(copy.deepcopy(reference), plan, rules=RULES))
    for attention in pair.model.attention:
        attention.first_head = attention.heads * pair.model._plait.ranks.t
    ids = torch.randint(0, 37, (3, length))
    found, expected = pair.model(ids), reference(ids)
    for out in (found, expected):
        (out.sin() * torch.arange(37)).sum().backward()
    whole = dict(reference.named_parameters())
    grads = [
        gradient_error(pair, p, whole[n])
        for n, p in pair.model.named_parameters()
        if whole[n].grad.abs().max() > 1e-9  # the gradient of a key's bias is zero without a mask
    ]
    result = {"logits": far(found, expected), "gradients": max(grads)}
    unparallelize(pair.model)
    for attention in pair.model.attention:
        attention.first_head = 0
    result["undone"] = 0.0 if torch.equal(pair.model(ids), expected) else 9.0
    return result


SIZES = {"tp2": 2, "tp4": 4, "kvp2:interleave=3": 2, "kvp2 tp2": 4, "kvp4:interleave=2 tp2": 8}


@pytest.mark.parametrize("plan", SIZES)
def test_exact(plan: str) -> None:
    """Causal, ALiBi and window attention, contexts with and without empty shards."""
    for bias, length in ((None, 11), ("alibi", 11), ("window", 3), (None, 40)):
        for found in run_world(errors, SIZES[plan], plan, bias, length):
            assert max(found.values()) < EXACT, (plan, bias, length, found)


@contextmanager
def one_rule_off():
    """Mutation: ranks own keys by position modulo kvp although the plan says otherwise on one of them."""
    original = modules.KeySplit.attend

    def shifted(self, q, k, v, **options):
        return original(self, q, k.roll(1, 2), v, **options)

    modules.KeySplit.attend = shifted
    try:
        yield
    finally:
        modules.KeySplit.attend = original


def mutated() -> dict[str, float]:
    with one_rule_off():
        return errors("kvp2:interleave=3", None, 11)


def test_a_shifted_key_is_seen() -> None:
    assert min(found["logits"] for found in run_world(mutated, 2)) > 1e-3


class Gated(nn.Module):
    """A block that adds its input back inside: a region entered at its door would count that gradient twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 31), nn.Linear(31, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


def gated() -> float:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 12), Gated(), Gated()).double()
    model = parallelize(
        copy.deepcopy(reference), "tp3", rules={"*.fc1": "colwise", "*.fc2": "rowwise"}
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    for m in (model, reference):
        m(x).sin().sum().backward()
    return far(model[0].weight.grad, reference[0].weight.grad)


def test_residual_inside_a_block() -> None:
    assert max(run_world(gated, 3)) < EXACT


@pytest.mark.parametrize(
    ("plan", "rules", "words"),
    [
        ("tp2", {**RULES, "up.*.fc": "colwise"}, "matches no module"),
        ("tp2", {**RULES, "up.*": "colwize"}, "did you mean 'colwise'"),
        ("tp2", {**RULES, "norms.*": "colwise"}, "computes something else"),
        (
            "tp3",
            {
                "attention.*": Attention(
                    heads=6, kv_heads=3, head_dim=4, q="wq", k="wk", v="wv", o="wo"
                )
            },
            "check heads",
        ),
        ("tp3", RULES, "does not divide the 8 query heads"),
        ("kvp3", RULES, "does not divide the 8 query heads"),
    ],
)
def test_wrong_rules(plan: str, rules: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        prepare(
            Model(), Plan.parse(plan), Groups.fake(Folding.of(Plan.parse(plan)), 0), rules=rules
        )
