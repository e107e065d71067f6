"""Prompts beside decodes: between what a step costs alone and both in turn; what is gained and what it stalls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.parallel import PlanError
from plait.parallel.planner import search
from plait.parallel.planner.attention_cost import prefill_flops
from plait.parallel.planner.candidates import crossed, grids
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.efficiency import ideal
from plait.parallel.planner.goals import Goal
from plait.parallel.planner.mixed import first_token, mixed_steps, ways
from plait.parallel.planner.reading import decoder
from plait.parallel.planner.step_time import Machine, Prompt, decode_step, prefill

H200 = hardware("h200")
NAMES = st.sampled_from(["llama-8b", "llama-70b", "qwen3-30b-a3b", "deepseek-r1", "gpt-oss-20b"])


def goal_of(prompt: int = 4096, **more: object) -> Goal:
    return Goal(ranks=8, context=8192, prompt=prompt, weights=("fp8",), kv=("fp8",), **more)  # type: ignore[arg-type]


def priced(
    name: str, goal: Goal, choices: list[tuple[int, int]], part: object = H200, light: bool = False
):
    model = decoder(name)
    machine = Machine(part, ideal(), "fp8", "fp8") if light else search.machines(part, goal)[0]  # type: ignore[arg-type]
    c = crossed(grids(model, 8, helix=False), (1, 16, 128))
    pure = decode_step(model, machine, c, goal.context).total
    return model, machine, c, pure, mixed_steps(model, machine, goal, c, pure, choices)


@settings(max_examples=10, deadline=None)
@given(NAMES, st.sampled_from([512, 2048, 8192]), st.booleans())
def test_one_product_over_all_rows_costs_no_more_than_both_in_turn(
    name: str, prompt: int, light: bool
) -> None:
    goal = replace(
        goal_of(prompt), context=prompt
    )  # nothing cached: MLA has nothing to decompress again
    model, machine, c, pure, mixed = priced(name, goal, [(prompt, 1)], light=light)
    alone = prefill(model, machine, c, prompt, chunk=None).total
    assert np.all(mixed.parts == 1)
    assert np.all(mixed.step > pure)
    one_stage = c.pp == 1  # what passes between stages is not in a prefill's price
    assert np.all((mixed.step <= (pure + alone) * 1.005)[one_stage])


@settings(max_examples=10, deadline=None)
@given(NAMES, st.sampled_from([1000, 4096, 16384]))
def test_a_larger_part_stalls_longer_and_a_smaller_one_takes_more_steps(
    name: str, prompt: int
) -> None:
    pieces = [(piece, 1) for piece in (128, 512, 1024) if piece <= prompt]
    *_, c, pure, mixed = priced(name, replace(goal_of(prompt), context=20000), pieces)
    steps = mixed.step.reshape(len(pieces), -1)
    assert np.all(np.diff(steps, axis=0) >= -1e-12)
    assert np.all(np.diff(mixed.parts.reshape(len(pieces), -1), axis=0) <= 0)
    assert np.all(steps >= pure)
    firsts = first_token(mixed).reshape(len(pieces), -1)
    alone = (c.pp == 1)[None] & (steps > 0)
    assert np.allclose(firsts[alone], (mixed.parts.reshape(steps.shape) * steps)[alone])


def test_the_parts_of_a_prompt_compute_what_the_whole_computes() -> None:
    """Pairs are shared out exactly; MLA's cache is decompressed again for every later part: N (N-1)/2 times a part."""
    for kind in decoder("gpt-oss-20b").kinds:
        parts = sum(float(prefill_flops(kind.attention, 256, 100 + 256 * i)) for i in range(8))
        assert parts == float(prefill_flops(kind.attention, 2048, 100))
    model, part = (
        decoder("deepseek-r1"),
        H200.scaled(memory_bandwidth=1e9),
    )  # nothing but FLOPs takes time
    machine = Machine(part, ideal(), "fp8", "fp8")
    c = crossed(grids(model, 1), (1,)).take(np.array([0]))
    up = sum(kind.count * kind.attention.up_params for kind in model.kinds)
    pairs = sum(kind.count * float(prefill_flops(kind.attention, 2048)) for kind in model.kinds)
    for beside in (2048, 512, 128):
        rows, n = c.passing(c.batch * beside, c.groups), 2048 // beside
        step, without = (
            decode_step(model, machine, rows, 64, p).total[0] for p in (Prompt(2048), None)
        )
        flops = n * (step - without) * part.peak("fp8")
        assert flops == pytest.approx(pairs + 2 * up * n * (n - 1) / 2 * beside, rel=1e-6)


def test_layer_groups_read_experts_once() -> None:
    """Layered prefill: experts are read for the prompt once, in chunks of 512 again and again."""
    goal = replace(goal_of(8192), context=8192)
    *_, pure, mixed = priced("qwen3-30b-a3b", goal, [(512, 1), (8192, 16)])
    extra = (mixed.parts * (mixed.step - np.tile(pure, 2))).reshape(2, -1)
    assert np.all(mixed.parts == 16)
    assert np.median(extra[1] / extra[0]) < 0.95
    assert np.min(extra[1] / extra[0]) < 0.5
    assert np.all(mixed.step.reshape(2, -1)[1] < 2 * mixed.step.reshape(2, -1)[0])


def test_ways_cover_the_prompt() -> None:
    assert ways(100, 32) == [(100, 1)]
    assert ways(1024, 32) == [(128, 1), (256, 1), (512, 1), (1024, 1), (1024, 2)]
    assert (16384, 32) in ways(16384, 32)  # no more groups than layers
    assert max(piece for piece, _ in ways(10**6, 32)) == 8192


@pytest.mark.parametrize("name", ["llama-70b", "deepseek-r1"])
def test_beside_pays_and_a_tighter_stall_never_raises_throughput(name: str) -> None:
    goal = replace(goal_of(8192, ttl=0.05), ranks=16)
    (machine,) = search.machines(H200, goal)
    points = search.within(search.aggregated_points(decoder(name), machine, goal), goal)
    alone = points.candidates.beside == 0
    assert points.per_rank[~alone].max() > points.per_rank[alone].max()
    assert points.stall[~alone].max() < points.stall[alone].max()
    best = []
    for stall in (0.03, 0.05, 0.1, 1.0):
        met = search.within(points, replace(goal, stall=stall))
        assert np.all(met.stall <= stall)
        best.append(float(met.per_rank.max()) if len(met) else 0.0)
    assert best == sorted(best)
    assert best[0] < best[-1]


def test_a_batch_whose_prompts_come_faster_than_steps_is_left_out() -> None:
    goal = replace(goal_of(8192), context=8192, output=64)
    (machine,) = search.machines(H200, goal)
    points = search.aggregated_points(decoder("llama-8b"), machine, goal)
    c = points.candidates
    beside = c.beside > 0
    assert beside.any()
    parts = np.ceil(goal.prompt / c.beside[beside]) * c.groups[beside]
    assert np.all(c.batch[beside] * parts / goal.output <= 1)
    with pytest.raises(PlanError, match="is no time"):
        goal_of(stall=0.0)


@settings(max_examples=8, deadline=None)
@given(NAMES, st.sampled_from(["memory_bandwidth", "fp8", "bf16", "scale_up"]), st.floats(1.01, 8))
def test_faster_hardware_never_hurts_a_mixed_step(name: str, figure: str, factor: float) -> None:
    goal, choices = goal_of(), [(512, 1), (4096, 8)]
    fast = H200.scaled(**{figure: factor})
    before, after = (priced(name, goal, choices, part)[-1].step for part in (H200, fast))
    assert np.all(after <= before * (1 + 1e-12))
