"""cp on modules that are nobody's model: rules say what holds the sequence."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import EXACT, far
from models import tokens
from plait.parallel import Attention, PlanError, RoutedExperts, Sequence, parallelize
from world import run_calls


class SelfAttention(nn.Module):
    """Grouped-query attention; ``causal`` or over everything."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.heads, self.kv_heads = causal, 4, 2
        self.wq, self.wv = nn.Linear(16, 16), nn.Linear(16, 8)
        self.wk = nn.Linear(16, 8, bias=False)  # whose gradient is zero but for rounding
        self.wo = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, 4)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.wo(o.transpose(1, 2).flatten(2))


class Routed(nn.Module):
    """A router, and experts as a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16)) for _ in range(4)
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.router(x).softmax(-1).topk(2)
        return index, weights

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        index, weights = self.route(flat)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(index == e)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, choice, None])
        return out.view_as(x)


class Model(nn.Module):
    """Tokens and their places in; one causal and one full attention; experts, where asked for."""

    def __init__(self, routed: bool = False) -> None:
        super().__init__()
        self.routed = Routed() if routed else None
        self.embedding, self.places = nn.Embedding(61, 16), nn.Embedding(64, 16)
        self.attention = nn.ModuleList(SelfAttention(causal) for causal in (True, False))
        self.up, self.down, self.head = nn.Linear(16, 34), nn.Linear(34, 16), nn.Linear(16, 61)

    def forward(self, ids: Tensor, places: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embedding(ids) * scale + self.places(places)
        for attention in self.attention:
            x = x + attention(x)
            x = x + self.down(F.gelu(self.up(x)))
            x = x if self.routed is None else x + self.routed(x)
        return {"logits": self.head(x), "states": x}


RULES: dict[str, Any] = {
    "": Sequence(inputs=("ids", "places"), attention=("attention.*",)),
    "embedding": "embedding_rowwise",
    "attention.*": Attention(
        heads=4, kv_heads=2, head_dim=4, q="wq", k="wk", v="wv", o="wo",
        counts=(("heads", "heads"), ("kv_heads", "kv_heads")),
    ),
    "up": "colwise",
    "down": "rowwise",
    "head": "colwise_gather_output",
}  # fmt: skip


def measure(plan: str, length: int, routed: bool = False) -> dict[str, float]:
    """Errors of outputs and of every gradient."""
    torch.manual_seed(0)
    reference = Model(routed).double()
    experts = {"routed": RoutedExperts(route=Routed.route)} if routed else {}
    model = parallelize(copy.deepcopy(reference), plan, rules=RULES | experts)
    ids, places = tokens(2, length), torch.arange(length).expand(2, -1)
    outs = []
    for each in (reference, model):
        outs.append(each(ids, places=places, scale=0.5))
        (outs[-1]["logits"].square().mean() + outs[-1]["states"].sin().sum()).backward()
    errors = {name: far(outs[1][name], outs[0][name]) for name in ("logits", "states")}
    cuts = {c.path: c for c in model._plait.parameters()}  # type: ignore[union-attr]
    ranks: Any = model._plait.ranks  # type: ignore[union-attr]
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        grad, wanted = p.grad, expected[name].grad
        assert wanted is not None
        wanted = cuts[name].take(wanted, ranks) if name in cuts else wanted
        if wanted.numel():  # not an expert that another rank holds
            assert grad is not None, name
            errors[name] = far(grad, wanted)
    return errors


def refused(rules: dict[str, Any], forward: Any) -> str:
    """What a wrong rule, or a forward that cannot be cut, is told."""
    try:
        forward(parallelize(Model(), "cp4", rules=rules))
    except PlanError as error:
        return str(error)
    return ""


def no_attention(_: nn.Module) -> None:
    """Never reached."""


def two_lengths(model: nn.Module) -> None:
    model(tokens(2, 9), torch.zeros(2, 8, dtype=torch.long))


NOWHERE = {"": Sequence(inputs=("ids",), attention=("attn.*",))}
CALLS = [
    (measure, "cp4:ring,ulysses=2", 13),
    (measure, "cp2 tp2", 13),
    (measure, "cp4", 3),
    (measure, "cp4 ep2", 13, True),
    (measure, "cp2 tp2 ep4", 13, True),
    (measure, "dp2 cp2:ulysses ep4", 13, True),
    (refused, {"up": "colwise"}, no_attention),
    (refused, NOWHERE, no_attention),
    (refused, {"": RULES[""]}, two_lengths),
]


def test_modules_by_rules_are_exact_or_refused() -> None:
    for *exact, unsaid, nowhere, lengths in run_calls(CALLS, 4):
        for errors in exact:
            assert max(errors.values()) < EXACT, errors
        assert "plait.Sequence(" in unsaid
        assert "matches no module" in nowhere
        assert "do not hold one sequence" in lengths
