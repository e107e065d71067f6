"""Properties: faster hardware never hurts, tighter goals never pay, and only legal plans come out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.parallel import Plan, PlanError
from plait.parallel.planner import search
from plait.parallel.planner.answer import answer
from plait.parallel.planner.attention_cost import prefill_pairs
from plait.parallel.planner.candidates import Candidates, crossed, grids
from plait.parallel.planner.catalogue import catalogue, hardware
from plait.parallel.planner.ffn_cost import uniform, zipf
from plait.parallel.planner.goals import Goal
from plait.parallel.planner.reading import decoder
from plait.parallel.planner.shapes import Attention, Decoder
from plait.parallel.planner.step_time import Machine, decode_step, prefill

MODELS = st.sampled_from(
    ["deepseek-r1", "llama-70b", "gpt-oss-120b", "qwen3.5-397b-a17b", "mixtral-8x7b"]
)
PARTS = st.sampled_from(sorted(catalogue()))
RANKS = st.sampled_from([1, 2, 6, 8, 16, 24, 64, 72])
FASTER = ("memory_bandwidth", "bf16", "scale_up", "scale_out")


@cache
def table(name: str, ranks: int) -> tuple[Decoder, Candidates]:
    model = decoder(name)
    return model, crossed(grids(model, ranks), (1, 16, 256), (1, 4))


def machine(part: str, **factors: float) -> Machine:
    chip = hardware(part).scaled(**factors)
    return Machine(chip, search.machines(chip, Goal(ranks=1, context=1))[0].constants, "fp8", "fp8")


@settings(max_examples=25, deadline=None)
@given(
    MODELS, PARTS, RANKS, st.sampled_from(FASTER), st.floats(1.01, 10), st.integers(1, 2_000_000)
)
def test_more_bandwidth_or_compute_never_hurts(
    name: str, part: str, ranks: int, figure: str, factor: float, context: int
) -> None:
    model, rows = table(name, ranks)
    figures = ["bf16", "fp8", "fp4"] if figure == "bf16" else [figure]
    factors = {f: factor for f in figures if getattr(hardware(part), f) is not None}
    slow, fast = machine(part), machine(part, **factors)
    before, after = (decode_step(model, m, rows, context).total for m in (slow, fast))
    assert np.all(after <= before * (1 + 1e-12))
    before, after = (prefill(model, m, rows, min(context, 65536)).total for m in (slow, fast))
    assert np.all(after <= before * (1 + 1e-12))


@settings(max_examples=15, deadline=None)
@given(MODELS, RANKS, st.integers(1, 500_000), st.integers(2, 4))
def test_a_longer_context_is_never_faster_and_never_smaller(
    name: str, ranks: int, context: int, times: int
) -> None:
    model, rows = table(name, ranks)
    m = machine("h200")
    near, far = (decode_step(model, m, rows, n).total for n in (context, context * times))
    assert np.all(far >= near * (1 - 1e-12))
    held, more = (search.fits(model, m, rows, n) for n in (context, context * times))
    assert np.all(more >= held)


@settings(max_examples=12, deadline=None)
@given(
    MODELS,
    st.sampled_from(["h200", "gb200", "mi355x"]),
    RANKS,
    st.floats(1, 200),
    st.floats(1.05, 4),
)
def test_a_tighter_latency_never_raises_throughput(
    name: str, part: str, ranks: int, milliseconds: float, looser: float
) -> None:
    goal = Goal(ranks=ranks, context=4096, ttl=milliseconds / 1e3, weights=("fp8",), kv=("fp8",))
    found = search.sweep(decoder(name), hardware(part), goal)
    best = []
    for wish in (goal, replace(goal, ttl=milliseconds * looser / 1e3)):
        met = [search.within(points, wish) for points in found]
        best.append(max((float(p.per_rank.max()) for p in met if len(p)), default=0.0))
    assert best[0] <= best[1]


@settings(max_examples=12, deadline=None)
@given(MODELS, PARTS, RANKS, st.sampled_from([0, 2048]), st.floats(5, 300), st.booleans())
def test_every_proposal_is_legal_fits_and_meets_the_goal(
    name: str, part: str, ranks: int, prompt: int, milliseconds: float, split: bool
) -> None:
    goal = Goal(ranks=ranks, context=4096, ttl=milliseconds / 1e3, prompt=prompt, split=split)
    if not search.sweep(decoder(name), hardware(part), goal):
        with pytest.raises(PlanError, match="does not fit"):
            answer(name, part, goal)
        return
    said = answer(name, part, goal)
    shape = decoder(name).shape
    for row in (*said.proposals, *said.frontier):
        plan = Plan.parse(row.plan)
        assert str(plan) == row.plan
        plan.validate(shape)
        assert plan.world_size <= row.ranks <= ranks
        assert row.memory <= hardware(part).memory.value
        assert sum(row.split.values()) == pytest.approx(1.0)
        assert min(row.split.values()) >= 0
    assert said.reached == all(row.ttl <= goal.ttl for row in said.proposals)  # type: ignore[operator]
    if not said.reached:
        assert all(row.ttl > goal.ttl for row in said.frontier)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.one_of(st.none(), st.integers(1, 200)))
def test_prefill_pairs_by_counting(new: int, past: int, window: int | None) -> None:
    attention = Attention(
        hidden=1, heads=1, kv_heads=1, head_dim=1, value_head_dim=1, window=window
    )
    counted = sum(min(position + 1, window or position + 1) for position in range(past, past + new))
    assert float(prefill_pairs(attention, new, past)) == counted


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 256), st.integers(1, 8), st.integers(1, 4096), st.floats(0, 2))
def test_coverage_is_a_share_that_grows(
    experts: int, chosen: int, tokens: int, exponent: float
) -> None:
    chosen = min(chosen, experts)
    for cover in (uniform, zipf(exponent)):
        one, some, more = (
            float(cover(experts, chosen, np.array([n]))[0]) for n in (1, tokens, tokens + 1)
        )
        assert one == pytest.approx(chosen / experts, rel=1e-6)
        assert 0 < one <= some * (1 + 1e-9) <= more * (1 + 1e-9) <= 1 + 1e-9
    assert (
        float(zipf(exponent)(experts, chosen, np.array([tokens]))[0])
        <= uniform(experts, chosen, tokens) + 1e-9
    )
