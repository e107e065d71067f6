"""Where caches wait, what is sent in 8 bits, which experts are read, and what users wait for under load."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from plait.parallel import Plan, PlanError
from plait.parallel.planner import search
from plait.parallel.planner.answer import answer
from plait.parallel.planner.candidates import one
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.efficiency import fitted
from plait.parallel.planner.ffn_cost import coverage, uniform, zipf
from plait.parallel.planner.goals import Goal
from plait.parallel.planner.loaded import under_load
from plait.parallel.planner.memory import request_bytes
from plait.parallel.planner.points import Points
from plait.parallel.planner.reading import decoder
from plait.parallel.planner.step_time import Machine, decode_step
from plait.parallel.planner.tiers import fetching, placed, tiers_of

H200 = hardware("h200")
MODEL = decoder("llama-70b")
TURNS = Goal(ranks=8, context=32768, prompt=2048, idle=4, weights=("fp8",), kv=("fp8",))


def priced(goal: Goal, part: object = H200) -> tuple[Machine, Points]:
    (machine,) = search.machines(part, goal)  # type: ignore[arg-type]
    return machine, search.aggregated_points(MODEL, machine, goal)


def test_waiting_sessions_take_memory_where_they_wait() -> None:
    machine, points = priced(TURNS)
    c = points.candidates
    waiting = 4 * c.batch * c.pp * request_bytes(MODEL, c, 32768, 1.0)
    for tier, room in (("host", H200.host_memory), ("disk", H200.disk)):
        assert room is not None
        kept = placed(MODEL, machine, TURNS, points, tier)
        assert 0 < len(kept) == int(np.sum(waiting <= room.value))
        assert kept.stored.max() <= room.value
        assert np.array_equal(kept.memory, points.memory[waiting <= room.value])
    assert len(placed(MODEL, machine, TURNS, points, "host")) < len(points)
    kept = placed(MODEL, machine, TURNS, points, "device")
    assert np.array_equal(kept.memory, (points.memory + waiting)[points.memory + waiting <= 141e9])
    assert np.all(kept.ftl == points.ftl[points.memory + waiting <= 141e9])


def test_a_fetch_delays_the_first_token_and_a_slow_link_all() -> None:
    machine, points = priced(TURNS)
    prefix = request_bytes(MODEL, points.candidates, 30720, 1.0)
    host = fetching(MODEL, machine, TURNS, points.candidates, "host")
    assert np.allclose(host, prefix / 64e9)
    assert np.allclose(fetching(MODEL, machine, TURNS, points.candidates, "disk"), prefix / 6.5e9)
    kept = placed(MODEL, machine, replace(TURNS, idle=0), points, "host")
    assert np.allclose(kept.ftl, points.ftl + host)
    assert np.array_equal(
        kept.ttl, points.ttl
    )  # 64 GB/s bring a prefix in less than its share of steps
    slow, _ = priced(TURNS, H200.scaled(host_link=1e-3))
    late = placed(MODEL, slow, replace(TURNS, idle=0), points, "host")
    c = points.candidates
    assert np.allclose(late.ttl, np.maximum(points.ttl, 1e3 * host * c.batch * c.pp / TURNS.output))
    assert np.allclose(late.throughput * late.ttl, points.throughput * points.ttl)
    assert np.allclose(late.causes.sum(axis=0), late.ttl)
    assert late.ttl.max() > points.ttl.max()


def test_recomputing_is_a_prompt_of_the_whole_context() -> None:
    wish = replace(TURNS, tiers=("recompute",))
    found = [p for p in search.sweep(MODEL, H200, wish) if p.mode == "aggregated"]
    whole = replace(TURNS, prompt=TURNS.context, idle=0)
    (same,) = [p for p in search.sweep(MODEL, H200, whole) if p.mode == "aggregated"]
    assert [p.tier for p in found] == ["recompute"]
    assert np.array_equal(found[0].ttl, same.ttl)
    assert np.array_equal(found[0].ftl, same.ftl)


def test_only_tiers_that_could_win_are_priced_and_choices_are_checked() -> None:
    assert tiers_of(replace(TURNS, idle=0)) == ("device",)
    assert tiers_of(TURNS) == ("device", "host", "disk", "recompute")
    assert tiers_of(replace(TURNS, idle=0, tiers=("host", "recompute"))) == ("host", "recompute")
    assert tiers_of(replace(TURNS, idle=0, prompt=32768)) == ("device",)
    for wrong, says in (
        ({"tiers": ("hots",)}, "did you mean 'host'"), ({"prompt": 0}, "keeps nothing for a next prompt"),
        ({"comm": ("mxfp4",)}, "use bf16 or fp8"), ({"idle": -1}, "cannot be"), ({"kv": ()}, "no kv"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=says):
            replace(TURNS, **wrong)  # type: ignore[arg-type]


def test_every_tier_reaches_the_answer_and_a_part_without_one_has_none() -> None:
    best = {}
    for tier in TURNS.tiers:
        said = answer("llama-70b", "h200", replace(TURNS, tiers=(tier,)))
        assert {row.tier for row in said.proposals} == {tier}
        assert all((row.stored > 0) == (tier != "recompute") for row in said.proposals)
        best[tier] = said.proposals[0].tokens_per_rank
    assert best["host"] > best["recompute"]
    assert answer("llama-70b", "h200", TURNS).proposals[0].tokens_per_rank == max(best.values())
    bare = replace(H200, host_memory=None)
    with pytest.raises(PlanError, match="does not fit"):
        answer("llama-70b", bare, replace(TURNS, tiers=("host",)))


@pytest.mark.parametrize(
    ("name", "text"), [("llama-405b", "kvp8 tp8"), ("deepseek-r1", "kvp8 dp8 ep64 etp1")]
)
def test_eight_bits_halve_what_is_moved_and_leave_what_is_summed(name: str, text: str) -> None:
    model, row = decoder(name), one(Plan.parse(text), 32)
    part = hardware("gb200")
    wide, narrow = (Machine(part, fitted(part), "fp8", "fp8", wire=w) for w in ("bf16", "fp8"))
    steps = [decode_step(model, machine, row, 65536).named(0) for machine in (wide, narrow)]
    for cause in ("weights", "kv", "compute", "floor"):
        assert steps[0][cause] == steps[1][cause]
    saved = steps[0]["communication"] - steps[1]["communication"]
    rate = 900e9 * wide.constants.link
    attention = model.kinds[0].attention
    width = attention.kv_rank or attention.value_head_dim
    tp, kvp = (int(column[0]) for column in (row.tp, row.kvp))
    moved = (
        model.layers * 32 * attention.heads / tp * width * (kvp - 1) / kvp
    )  # one byte less an element
    if name == "llama-405b":
        assert saved == pytest.approx(moved / rate, rel=1e-6)
    else:  # and the way back from the experts, and the gather of what came
        layers = sum(kind.count for kind in model.kinds if kind.ffn.experts)
        back = layers * (32 / 8 * 7168 * 8 * 63 / 64 + 32 * 7168 * 7 / 8)
        assert saved == pytest.approx((moved + back) / rate, rel=1e-6)


def test_a_narrower_wire_is_proposed_only_where_it_helps() -> None:
    goal = Goal(ranks=8, context=8192, weights=("fp8",), comm=("bf16", "fp8"))
    assert {row.comm for row in answer("llama-8b", "h200", replace(goal, ranks=1)).proposals} == {
        "bf16"
    }
    said = answer("deepseek-r1", "h200", replace(goal, ranks=16))
    assert said.proposals[0].comm == "fp8"
    assert "no measured point with fp8 on the wire" in said.proposals[0].provenance
    only = answer("deepseek-r1", "h200", replace(goal, ranks=16, comm=("bf16",)))
    assert said.proposals[0].tokens_per_rank > only.proposals[0].tokens_per_rank


def test_the_curve_of_experts_is_a_choice() -> None:
    goal = Goal(ranks=8, context=4096, ttl=0.02, weights=("fp8",))
    read = [
        answer("qwen3-235b-a22b", "h200", goal, cover=curve).proposals[0].tokens_per_rank
        for curve in (uniform, None, zipf(2.0))
    ]
    assert read == sorted(read)
    assert read[0] < read[2]
    assert coverage("uniform") is uniform
    for text, exponent in (("zipf", 1.25), ("zipf:0.5", 0.5)):
        assert coverage(text)(64, 4, np.array([9.0])) == zipf(exponent)(64, 4, np.array([9.0]))
    for text in ("pareto", "zipf:-1", "zipf:x", "uniform:2"):
        with pytest.raises(PlanError, match="no curve"):
            coverage(text)


@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
def test_under_load_waits_grow_from_the_unloaded_first_token(mode: str) -> None:
    goal = Goal(ranks=8, context=4096, prompt=4096, output=128, ttl=0.03, weights=("fp8",))
    said = answer("qwen3-32b", "h200", goal, most=500)
    row = next(row for row in said.proposals if row.mode == mode)
    capacity = row.tokens_per_rank * 8 / 128
    seen = [
        under_load(decoder("qwen3-32b"), H200, goal, row, rate * capacity)
        for rate in (0.01, 0.5, 0.95, 3.0)
    ]
    assert seen[0].first_token == pytest.approx(seen[0].unloaded, rel=0.02)
    firsts = [one.first_token_p99 for one in seen]
    assert firsts == sorted(firsts)
    assert firsts[-1] > 5 * seen[0].unloaded
    assert [one.overloaded for one in seen] == [False, False, False, True]
    for one_ in seen:
        assert one_.first_token <= one_.first_token_p99
        assert one_.per_token <= one_.per_token_p99
        assert one_.capacity == pytest.approx(capacity)
    assert seen[0].per_token < seen[2].per_token <= row.ttl * 1.1
