"""Other ways to the experts: static shapes, over nodes, beside the shared expert; and the z-loss."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from exactness import EXACT, Pair, case, far, worst
from models import StayFloat64, tiny, tokens
from plait import RouterZLoss
from plait.collectives.primitive import chunk_sizes
from plait.collectives.trace import Trace
from plait.parallel import Plan, PlanError
from plait.parallel.experts import nodes, static
from plait.parallel.experts.capacity import Capacity
from training import backward, batch_of, by_hand, coordinate, gradient_errors, loss, trained
from world import run_calls

PAD = "capacity=0.7,pad=true"


def padded(plan: str, family: str) -> dict[str, float]:
    """Gradients against one process whose experts drop by hand, on each rank's own tokens."""
    pair = Pair.of(case(plan, family))
    plan_ = pair.model._plait.plan
    drops: list[int] = []

    def drop(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, index, weights = args
        sizes = chunk_sizes(len(index), plan_.size("ffn_tp"))
        most = Capacity(plan_.ep.capacity, plan_.ep.drop).rows(
            sizes[0], index.shape[1], module.num_experts
        )
        kept = [
            by_hand(i, w, module.num_experts, most, plan_.ep.drop)
            for i, w in zip(index.split(sizes), weights.split(sizes), strict=True)
        ]
        drops.append(int((~torch.cat(kept)).sum()))
        return hidden, index, weights * torch.cat(kept)

    for layer in pair.reference.model.layers:
        layer.mlp.experts.register_forward_pre_hook(drop)
    dp = plan_.dp.size
    for d in range(dp):
        (loss(pair.reference, batch_of(0, d)) / dp).backward()
    loss(pair.model, batch_of(0, coordinate(pair.model))).backward()
    assert sum(drops) > 3
    return gradient_errors(pair)


def unequal(plan: str) -> str:
    """The dp ranks are given batches of different lengths."""
    try:
        backward(Pair.of(case(plan, "mixtral")))
    except PlanError as error:
        return str(error)
    return "nothing"


def off_by_one(plan: str, family: str) -> dict[str, float]:
    """Negative control: rows come back in the order they were computed in."""
    with patch.object(static, "_swapped", lambda x, *_: x):
        return padded(plan, family)


def crossing(plan: str) -> tuple[float, int, int, int]:
    """Rows that went to another node there and back, pairs of token and node, and pairs of token and expert there."""
    pair = Pair.of(case(plan, "qwen3_moe"))
    layer = pair.model.model.layers[0].mlp.experts
    here: nodes.Nodes = layer._plait_experts.nodes
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    index = torch.rand(9, 8, generator=generator).topk(3).indices
    groups = pair.model._plait.ranks.groups
    hidden = torch.randn(9, 48, dtype=torch.float64)
    with (
        torch.no_grad(),
        Trace(lambda g: str(sorted(torch.distributed.get_process_group_ranks(g)))) as trace,
    ):
        layer(hidden, index, torch.rand(9, 3, dtype=torch.float64))
    far_group = str(sorted(torch.distributed.get_process_group_ranks(here.group)))
    assert len(groups.made) > 0
    rows = sum(e.sent_bytes for e in trace.events
               if e.op == "all_to_all" and e.axis == far_group and e.shape[1:] == (48,))  # fmt: skip
    away = (index // 4) != here.here
    # what comes back from here is what others sent here: the sum over ranks counts
    return rows / (48 * 8), int(away.any(1).sum()), int(away.sum()), here.here


def one_row_for_all(plan: str) -> dict[str, float]:
    """Negative control: a node answers with the sum, not the weighted sum."""
    original = nodes.to_owners
    with patch.object(nodes, "to_owners", lambda *a: original(*a[:4], torch.ones_like(a[4]))):
        return trained(case(plan, "mixtral"), 1)


def beside(plan: str, family: str) -> dict[str, float]:
    """Exact, and where the shared expert computes: 1 within the exchange there, 0 after the one back."""
    pair = Pair.of(case(plan, family))
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = pair.reference(ids, use_cache=False).logits
        pair.model(ids, use_cache=False)
        with Trace() as trace:
            found = pair.model(ids, use_cache=False).logits
    spans = [s for s in trace.spans if s.name == "shared expert"]
    there, back = [e for e in trace.events if e.op == "all_to_all"][:2]
    within = bool(spans) and there.start <= spans[0].start and spans[0].end <= back.start
    return {"logits": far(found, expected), "within": float(within), "ran": float(len(spans))}


def z_loss(plan: str, forget: bool = False) -> dict[str, float]:
    """Training with the z-loss against one process; ``forget`` leaves out the other cp ranks' part."""
    pair = Pair.of(case(plan, "mixtral"))
    losses = {id(m): RouterZLoss(m, 0.5) for m in (pair.reference, pair.model)}
    if forget:
        losses[id(pair.model)].group = None
    told: list[Tensor] = []

    def with_z(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        with StayFloat64():
            plain = loss(model, batch)
        told.append(losses[id(model)]())
        return plain + told[-1]

    backward(pair, loss=with_z)
    right = sum(x.logsumexp(-1).square().mean() for x in losses[id(pair.reference)].logits) / 2
    dp = pair.model._plait.plan.dp.size
    return {
        "gradients": max(gradient_errors(pair).values()),
        "by hand": far(told[dp - 1], right),
        "told": far(told[-1], told[coordinate(pair.model)]),
    }


TWO: list[Any] = [
    (padded, f"dp2 ep2,{PAD}", "mixtral"),
    (padded, f"tp2 ep2,{PAD},drop=position", "qwen3_moe"),
    (padded, f"tp2 ep1,{PAD} etp2", "gpt_oss"),
    (z_loss, "tp2 ep2"),
    (z_loss, "cp2 ep2"),
    (z_loss, "dp2 ep2"),
    (trained, case("dp2 ep2", "deepseek"), 2),
    (beside, "dp2 ep2", "deepseek"),
    (beside, "tp2 ep2,exchange=tokens", "deepseek"),
    (beside, "dp2 ep2", "qwen2_moe"),
    (off_by_one, f"dp2 ep2,{PAD}", "mixtral"),
    (z_loss, "cp2 ep2", True),
    (unequal, f"dp2 ep2,{PAD}"),
]
FOUR: list[Any] = [
    (trained, case("dp4 ep4,nodes=2", "qwen3_moe"), 2),
    (trained, case("dp2 tp2 ep4,nodes=2", "mixtral"), 2),
    (trained, case("dp4 ep2,nodes=2 etp2", "gpt_oss"), 1),
    (one_row_for_all, "dp4 ep4,nodes=2"),
    (crossing, "dp4 ep4,nodes=2"),
]


def test_two_ranks() -> None:
    answers = run_calls(TWO, 2)
    for i, each in enumerate(TWO):
        found = [answer[i] for answer in answers]
        print(each[0].__name__, each[1:], found)
        if each[0] is unequal:
            assert all("input's shape" in text for text in found), found
        elif each[0] is beside:
            assert all(errors["logits"] < EXACT for errors in found)
            early = float(each[2] == "deepseek")  # Qwen2's block calls it before the router
            assert all(errors["ran"] == errors["within"] == early for errors in found), found
        elif each[0] is off_by_one or each[-1] is True:
            assert not max(worst(found).values()) < 1e-3
        else:
            assert max(worst(found).values()) < EXACT, each


def test_four_ranks() -> None:
    answers = run_calls(FOUR, 4)
    for i, each in enumerate(FOUR[:-1]):
        errors = worst([answer[i] for answer in answers])
        print(each[0].__name__, each[1:], errors)
        if each[0] is one_row_for_all:
            assert not errors["gradients"] < 1e-3
        else:
            assert max(errors.values()) < EXACT, each
    sent = [answer[-1] for answer in answers]
    assert sum(rows for rows, *_ in sent) == 2 * sum(tokens for _, tokens, *_ in sent)
    assert sum(tokens for _, tokens, *_ in sent) < sum(pairs for *_, pairs, _ in sent)


def test_padding_reads_nothing_and_sends_its_formula() -> None:
    """On meta there is no value to read: the run itself shows that none is needed."""
    model = tiny("qwen3_moe")
    said = Plan.parse("dp4 ep4,capacity=1.5,pad=true").explain(
        model, context=16, batch=2, backward=True
    )
    rows = 8 * -(-2 * 16 * 3 * 3 // (8 * 2))
    there = [e for e in said.step("training").events if e.op == "all_to_all"]
    assert [e.sent_bytes for e in there] == [rows * 3 // 4 * 48 * 8] * 8, (
        "there and back, both ways, of two layers"
    )


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("dp2 ep2,pad=true", "give capacity="),
        ("tp2 ep2,capacity=1.0,pad=true,exchange=sums", "not exchange=sums"),
        ("cp2 ep2,capacity=1.0,pad=true", "which cp=2 does not promise"),
        ("tp2:sp ep2,capacity=1.0,pad=true", "which tp:sp does not promise"),
        ("dp4 ep4,nodes=3", "use nodes in {1, 2, 4}"),
    ],
)
def test_refusals(plan: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Plan.parse(plan).validate()
