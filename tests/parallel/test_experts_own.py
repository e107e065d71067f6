"""Experts that are nobody's model: stacks with code of their own, lists of modules, blocks that route by themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exactness import EXACT, far
from plait.parallel import Plan, PlanError, RoutedExperts, parallelize, unparallelize
from plait.parallel.api import prepare
from plait.parallel.folding import Folding
from plait.parallel.groups import Groups
from world import run_calls

HIDDEN, EXPERTS = 12, 4


class Stacked(nn.Module):
    """Experts in stacks of its own names and layout, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.first = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 10) * 0.3)
        self.shift = nn.Parameter(torch.randn(EXPERTS, 10))
        self.second = nn.Parameter(torch.randn(EXPERTS, 10, HIDDEN) * 0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, choice = torch.where(index == e)
            inner = torch.tanh(x[token] @ self.first[e] + self.shift[e])
            out = out.index_add(0, token, inner @ self.second[e] * weights[token, choice, None])
        return out


class Listed(nn.Module):
    """Experts as a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 9), nn.GELU(), nn.Linear(9, HIDDEN))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(index == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return out


class Block(nn.Module):
    """A router and experts; the loop over experts may stand in the block itself."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.inner = nn.Linear(HIDDEN, EXPERTS), experts

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.router(x).softmax(-1).topk(2)
        return index, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, *self.route(x))


class Alone(nn.Module):
    """One block that routes and loops by itself, over a list of modules, for [batch, seq, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.list = nn.Linear(HIDDEN, EXPERTS), Listed().experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        index, weights = routed(self, flat)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.list):
            token, choice = torch.where(index == e)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, choice, None])
        return out.view_as(x)


def routed(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = block.router(x).softmax(-1).topk(2)
    return index, weights


class Model(nn.Module):
    """Residual blocks between two projections."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make = {
            "stacked": lambda: Block(Stacked()),
            "listed": lambda: Block(Listed()),
            "alone": Alone,
        }
        self.enter, self.leave = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 5)
        self.blocks = nn.ModuleList(make[kind]() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


RULES: dict[str, Any] = {
    "stacked": {"blocks.*.inner": "experts"},
    "listed": {"blocks.*.inner": "experts"},
    "alone": {"blocks.*": RoutedExperts(route=routed, experts="list")},
}


def own(kind: str, plan: str) -> dict[str, float]:
    """Outputs, gradients, and everything back after unparallelize."""
    torch.manual_seed(1)
    reference = Model(kind).double()
    model = parallelize(copy.deepcopy(reference), plan, rules=RULES[kind])
    dp, d = (
        model._plait.plan.dp.size,
        model._plait.ranks.groups.folding.coords(torch.distributed.get_rank())["dp"],
    )
    x = torch.randn(dp, 11, 5, dtype=torch.float64)
    sizes = [(1, 11) if kind == "alone" else (11,) for _ in range(dp)]
    right = [reference(x[i].view(*sizes[i], 5)) for i in range(dp)]
    sum(out.square().sum() / dp for out in right).backward()  # type: ignore[union-attr]
    found = model(x[d].view(*sizes[d], 5))
    found.square().sum().backward()
    errors = {"outputs": far(found, right[d])}
    cuts = {e.path: e for e in model._plait.parameters()}
    wanted = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        grad = wanted[name].grad
        assert grad is not None
        part = cuts[name].take(grad, model._plait.ranks) if name in cuts else grad
        if part.numel():
            assert p.grad is not None, name
            found_grad: Any = p.grad
            whole = found_grad.full_tensor() if isinstance(found_grad, DTensor) else found_grad
            errors[name] = far(whole, part)
    held = sum(p.numel() for p in model.parameters())
    assert held < 0.8 * sum(p.numel() for p in reference.parameters()), "every rank holds a part"
    unparallelize(model)
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())
    return errors


def test_modules_of_any_form_are_exact() -> None:
    calls = [(own, kind, plan) for kind in RULES for plan in ("tp2 ep2", "dp2 ep2")]
    calls.append((own, "listed", "dp2:shard ep2"))  # another rank's experts are empty here
    for answers in run_calls(calls, 2):
        for call, errors in zip(calls, answers, strict=True):
            name = max(errors, key=errors.__getitem__)
            assert errors[name] < EXACT, (call[1:], name, errors[name])


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("tp2 etp2", "not packed as transformers packs them"),
        ("tp3 ep3", "does not divide its 4 experts"),
    ],
)
def test_what_cannot_be_cut_is_refused(plan: str, said: str) -> None:
    parsed = Plan.parse(plan)
    groups = Groups.fake(Folding.of(parsed), 0)
    with pytest.raises(PlanError, match=said):
        prepare(Model("listed"), parsed, groups, rules=RULES["listed"])
