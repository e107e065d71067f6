"""Experts that come to tokens (FSSDP), experts that are with every token (MoE++), and narrow ones (LatentMoE)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from exactness import EXACT, Pair, case, far, worst
from models import tiny
from plait import LocalExperts
from plait.collectives.trace import Trace
from plait.parallel import Experts, Fssdp, Plan, PlanError, RoutedExperts, parallelize
from plait.parallel.experts import fssdp
from plait.parallel.experts.fssdp import Materialiser, chunks_of, materialised
from plait.parallel.experts.placement import Placement
from training import backward, batch_of, coordinate, labelled, loss, trained
from world import run_calls

HIDDEN, LATENT, FFN = 16, 4, 4


def test_copies_go_to_idle_ranks() -> None:
    owned = Placement.even(6, 3)
    found = materialised([90, 10, 0, 30, 20, 0], owned, 1)
    assert [set(own) - set(kept) for own, kept in zip(found.ranks, owned.ranks, strict=True)] == [
        {3},
        {0},
        {0},
    ]
    assert chunks_of(owned, found).sent_chunks(0) == 2
    assert materialised([0] * 6, owned, 2) == owned
    assert materialised([7] * 6, owned, 4) == owned, "nothing is gained"
    full = Placement(6, (tuple(range(6)),) * 3)
    near = full.spread(torch.arange(6)[:, None], near=1)[:, 0]
    assert near.tolist() == [6 + e for e in range(6)]


def test_plans() -> None:
    plan = Plan(ep=Fssdp(2, spare=3), dp=2)
    assert str(plan) == "dp2 ep2:fssdp,spare=3 etp1"
    assert Plan.parse(str(plan)) == plan == Plan.from_json(plan.to_json())
    assert plan != Plan(ep=Experts(2), dp=2)
    for text, told in (
        ("tp2 ep1:fssdp etp2", "use ep > 1"),
        ("dp2 ep2:fssdp,pad=true,capacity=1.0", "without"),
    ):
        with pytest.raises(PlanError, match=told):
            Plan.parse(text).validate()
    said = Plan.parse("dp2 ep2:fssdp").explain(tiny("mixtral"), context=8)
    assert "copies no experts" in " ".join(said.notes)
    with pytest.raises(PlanError, match="use spare <= 2"):
        Plan.parse("dp2 ep2:fssdp,spare=3").explain(tiny("mixtral"), context=8)


def copies_of(model: Any) -> list[Materialiser | None]:
    return [layer.mlp.experts._plait_experts.copies for layer in model.model.layers]


def steps(plan: str, family: str, count: int, checkpointing: bool = False) -> dict[str, float]:
    """Steps of SGD; from the second on experts are copied."""
    seen: list[int] = []
    begin = Materialiser.begin

    def watched(self: Materialiser) -> None:
        begin(self)
        assert self.placement is not None
        seen.append(self.placement.slots - self.owned.slots)

    def prepared(*args: Any) -> Pair:
        pair = original(*args)
        if checkpointing:
            pair.model.gradient_checkpointing_enable({"use_reentrant": False})
            pair.model.train()
        return pair

    original = Pair.of
    with patch.object(Materialiser, "begin", watched), patch.object(Pair, "of", prepared):
        errors = trained(case(plan, family), count)
    assert max(seen) > 0, "nothing was copied"
    return errors


def not_summed(plan: str, family: str, count: int) -> dict[str, float]:
    """Negative control: owners keep the gradients of their own rows only."""

    def own_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chunks, group = ctx.of
        rank = group.rank()
        held = chunks.held(rank)
        return grad[[held.index(c) for c in chunks.owned(rank)]], None, None, None

    with patch.object(fssdp._Held, "backward", staticmethod(own_rows)):
        return trained(case(plan, family), count)


@contextmanager
def gathered() -> Iterator[list[weakref.ref]]:
    """Every tensor that a gather brought."""
    found: list[weakref.ref] = []
    original = fssdp.Underway.wait

    def wait(self: Any) -> Tensor:
        out = original(self)
        found.append(weakref.ref(out))
        return out

    with patch.object(fssdp.Underway, "wait", wait):
        yield found


def weighed(plan: str) -> dict[str, int]:
    """Bytes of a step of which all tokens want the first two experts, of eight on two ranks."""
    pair = Pair.of(case(plan, "qwen3_moe"))
    for layer in pair.model.model.layers:
        layer.mlp.gate.weight.data[2:].mul_(0.01)
        layer.mlp.gate.weight.data[:2].mul_(0.01).add_(0.05)
    backward(pair)
    pair.model.zero_grad()
    with Trace() as trace, gathered() as copies:
        out = loss(pair.model, batch_of(coordinate(pair.model)))
        kept = sum(ref() is not None for ref in copies)
        moved = len(copies)
        out.backward()
    told: dict[str, int] = {"kept after forward": kept, "gathers": moved, "copies": 0}
    for copies_here in copies_of(pair.model):
        if copies_here is not None:
            assert copies_here.placement is not None
            told["copies"] += copies_here.placement.slots - copies_here.owned.slots
    for op in ("all_to_all", "send"):
        told[op] = sum(e.sent_bytes for e in trace.events if e.op == op)
    return told


class PlusPlus(nn.Module):
    """MoE++'s experts: stacks of FFN experts, and more that cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = FFN
        self.up = nn.Parameter(torch.randn(FFN, HIDDEN, 10) * 0.3)
        self.down = nn.Parameter(torch.randn(FFN, 10, HIDDEN) * 0.3)
        self.free = LocalExperts(HIDDEN, zero=1, copy=1, constant=2)
        nn.init.normal_(self.free.vector)
        nn.init.normal_(self.free.mix)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = self.free(x, index - self.num_experts, weights)
        for e in range(self.num_experts):
            token, choice = torch.where(index == e)
            inner = torch.tanh(x[token] @ self.up[e]) @ self.down[e]
            out = out.index_add(0, token, inner * weights[token, choice, None])
        return out


class Narrow(nn.Module):
    """Routed experts of a latent width between two projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_experts = FFN
        self.inner = nn.Parameter(torch.randn(FFN, width, width) * 0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, choice = torch.where(index == e)
            out = out.index_add(
                0, token, torch.tanh(x[token] @ self.inner[e]) * weights[token, choice, None]
            )
        return out


class Block(nn.Module):
    def __init__(self, experts: nn.Module, choices: int, width: int = HIDDEN) -> None:
        super().__init__()
        self.router, self.inner = nn.Linear(HIDDEN, choices), experts
        plain = width == HIDDEN
        self.narrow = nn.Identity() if plain else nn.Linear(HIDDEN, width)
        self.widen = nn.Identity() if plain else nn.Linear(width, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(2)
        return x + self.widen(self.inner(self.narrow(x), index, weights))


def built(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(2)
    if kind == "plus":
        blocks = [Block(PlusPlus(), FFN + 4) for _ in range(2)]
        return nn.Sequential(*blocks).double(), {"*.inner": RoutedExperts(local="free")}
    width = LATENT if kind == "latent" else HIDDEN
    return nn.Sequential(*(Block(Narrow(width), FFN, width) for _ in range(2))).double(), {
        "*.inner": "experts"
    }


def own(kind: str, plan: str) -> dict[str, float]:
    """Gradients, and the bytes that travel: those of pairs with experts on other ranks, of their width."""
    reference, rules = built(kind)
    model = parallelize(copy.deepcopy(reference), plan, rules=rules)
    ranks = model._plait.ranks  # type: ignore[union-attr]
    dp = ranks.plan.dp.size
    x = torch.randn(dp, 13, HIDDEN, dtype=torch.float64)
    chosen: list[Tensor] = []
    for block in reference.children():
        block.inner.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    outs = [reference(x[d]) for d in range(dp)]
    (sum(out.square().sum() for out in outs) / dp).backward()  # type: ignore[union-attr]
    d = ranks.groups.folding.coords(torch.distributed.get_rank())["dp"]
    with Trace() as trace:
        found = model(x[d])
    found.square().sum().backward()
    errors = {"outputs": far(found, outs[d])}
    cuts, wanted = (
        {e.path: e for e in model._plait.parameters()},
        dict(reference.named_parameters()),
    )  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        grad = wanted[name].grad
        assert grad is not None
        errors[name] = far(p.grad, cuts[name].take(grad, ranks) if name in cuts else grad)  # type: ignore[arg-type]
    sent = sum(e.sent_bytes for e in trace.events if e.op == "all_to_all")
    if dp > 1:
        width = LATENT if kind == "latent" else HIDDEN
        mine = chosen[2 * d : 2 * d + 2]
        away = [int(((index < FFN) & (index // (FFN // 2) != d)).sum()) for index in mine]
        others = [
            int((index // (FFN // 2) == d).sum()) for index in chosen[2 * (1 - d) : 2 * (1 - d) + 2]
        ]
        errors["bytes"] = float(abs(sent - (sum(away) + sum(others)) * width * 8))
        errors["nothing travels"] = float(sent == 0)
    return errors


def crosses_too(kind: str, plan: str) -> dict[str, float]:
    """Negative control: what is computed where the token is, is computed by nobody."""
    with patch.object(LocalExperts, "forward", lambda self, x, index, weights: torch.zeros_like(x)):
        reference, rules = built(kind)
        model = parallelize(copy.deepcopy(reference), plan, rules=rules)
        x = torch.randn(13, HIDDEN, dtype=torch.float64)
        out = model(x)
    return {"outputs": far(out, reference(x))}


TWO: list[Any] = [
    (steps, "dp2 ep2:fssdp,spare=2", "mixtral", 4),
    (steps, "tp2 ep2:fssdp,spare=1", "gpt_oss", 3),
    (steps, "dp2 ep2:fssdp,spare=3", "qwen3_moe", 3, True),
    (own, "plus", "dp2 ep2"),
    (own, "plus", "tp2 ep2"),
    (own, "latent", "dp2 ep2"),
    (own, "wide", "dp2 ep2"),
    (not_summed, "dp2 ep2:fssdp,spare=2", "mixtral", 4),
    (crosses_too, "plus", "tp2 ep2"),
    (weighed, "dp2 ep2:fssdp,spare=2"),
    (weighed, "dp2 ep2"),
]


def test_two_ranks() -> None:
    answers = run_calls(TWO, 2)
    for i, each in enumerate(TWO[:-2]):
        errors = worst([answer[i] for answer in answers])
        print(each[0].__name__, each[1:], errors)
        if each[0] is not_summed or each[0] is crosses_too:
            assert not max(errors.values()) < 1e-4, each
        else:
            assert max(errors.values()) < EXACT, each
    sparse, plain = ([answer[i] for answer in answers] for i in (-2, -1))
    print(sparse, plain)
    for copied, without in zip(sparse, plain, strict=True):
        assert copied["gathers"] > 0 == copied["kept after forward"], (
            "copies do not wait for the backward"
        )
        assert copied["all_to_all"] < 0.5 * without["all_to_all"]
    # a copy's weights travel for the forward and again for the backward, and its gradients once
    chunk = 3 * 18 * 48 * 8
    assert sum(told["send"] for told in sparse) == 3 * sparse[0]["copies"] * chunk > 0


def staged(plan: str) -> dict[str, float]:
    """Under a pipeline the model's own loss is what its schedule knows."""
    return trained(case(plan, "mixtral"), 2, loss=labelled)


def test_four_ranks() -> None:
    calls: list[Any] = [
        (steps, "dp2 tp2 ep4:fssdp,spare=1", "qwen3_moe", 3),
        (steps, "dp4 ep2:fssdp", "mixtral", 2),
        (steps, "dp2:shard tp2 ep4:fssdp,spare=1", "mixtral", 2),
        (staged, "pp2 dp2 ep2:fssdp,spare=2"),
        (staged, "pp2 dp2 ep2,nodes=2"),
        (staged, "pp2 tp2 ep2,capacity=9.0,pad=true"),
    ]
    answers = run_calls(calls, 4)
    for i, each in enumerate(calls):
        errors = worst([answer[i] for answer in answers])
        print(each[1:], errors)
        assert max(errors.values()) < EXACT, each
