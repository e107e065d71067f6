"""Routing is recorded as it is, placements made from it are good, and what they promise is what the dispatcher does."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from exactness import Pair, case
from models import tiny, tokens
from plait import Routing, record_routing
from plait.collectives.trace import Trace
from plait.parallel import PlanError
from plait.parallel.cli import app
from plait.parallel.experts.packing import balanced
from plait.parallel.experts.placement import Placement, read_placements, write_placements
from plait.parallel.experts.traffic import imbalance, predicted, weigh
from plait.parallel.experts.tuner import assigned, clustered, tuned
from training import coordinate
from world import run_calls

IDS = (2, 24)


def recorded(model: Any, ids: torch.Tensor) -> Routing:
    with torch.no_grad(), record_routing(model) as routing:
        model(ids, use_cache=False)
    return routing


def skewed(model: Any) -> Any:
    """Make some experts popular."""
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[:2] *= 4.0
    return model


@pytest.fixture(scope="module")
def routing() -> Routing:
    return recorded(skewed(tiny("qwen3_moe")), tokens(*IDS))


def test_choices_are_recorded_and_kept(routing: Routing, tmp_path: Path) -> None:
    count = IDS[0] * IDS[1]
    assert [tuple(c.shape) for c in routing.chosen.values()] == [(count, 3)] * 2
    first, second = routing.experts
    assert routing.loads(first).sum() == count * 3
    passages = routing.passages(first, second)
    a, b = routing.chosen[first], routing.chosen[second]
    assert passages[2, 5] == sum(int((a[t] == 2).sum() * (b[t] == 5).sum()) for t in range(count))
    routing.save(tmp_path / "one.safetensors")
    both = Routing.load(tmp_path / "one.safetensors", tmp_path / "one.safetensors")
    assert torch.equal(both.loads(first), 2 * routing.loads(first))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(PlanError, match="cannot be read"):
        Routing.load(tmp_path / "bad.safetensors")
    with pytest.raises(PlanError, match="finds no experts"), record_routing(torch.nn.Linear(2, 2)):
        pass


def test_copies_go_where_the_work_is() -> None:
    loads = [90.0, 10.0, 40.0, 20.0, 5.0, 15.0]
    placement = balanced(loads, 3, spare=1)
    assert placement.sizes == (3, 3, 3)
    copies = [len(home) for home in placement.homes]
    assert copies[0] == max(copies) >= 2
    told = predicted(torch.tensor(loads), placement)
    assert told < 1.15 < predicted(torch.tensor(loads), Placement.even(6, 3))
    everywhere = balanced(loads, 3, spare=4)
    assert predicted(torch.tensor(loads), everywhere) == pytest.approx(1.0)
    with pytest.raises(PlanError, match="ranks=4"):
        balanced(loads, 4)


def test_clusters_are_the_best_there_are() -> None:
    loads = np.array([17.0, 13, 11, 9, 8, 2])

    def distance(clusters: Any) -> float:
        return sum(abs(loads[list(c)].sum() - loads.sum() / 2) for c in clusters)

    halves = [(c, tuple(set(range(6)) - set(c))) for c in combinations(range(6), 3)]
    found = clustered(loads, 2, 60.0)
    assert sorted(e for c in found for e in c) == list(range(6))
    assert distance(found) == min(map(distance, halves))
    assert distance(found) < distance(balanced(loads.tolist(), 2).ranks), "greedy is not as good"


@pytest.mark.parametrize("slow", [False, True])
def test_clusters_go_where_their_tokens_are(slow: bool) -> None:
    traffic = np.random.default_rng(0).integers(1, 90, (4, 4)).astype(float)
    speed = np.ones((4, 4))
    if slow:
        speed[:2, 2:] = speed[2:, :2] = 0.1

    def worst(order: Any) -> float:
        return max(traffic[s, order[t]] / speed[s, t] for s in range(4) for t in range(4) if s != t)

    assert worst(assigned(traffic, speed, 60.0)) == min(worst(o) for o in permutations(range(4)))


def test_both_are_better_than_none(routing: Routing) -> None:
    even = weigh(routing, {n: Placement.even(8, 4) for n in routing.experts})
    made = weigh(routing, tuned(routing, 4, seconds=60.0))
    copied = weigh(routing, {n: balanced(routing.loads(n).tolist(), 4, 1) for n in routing.experts})
    for layer, before in even.items():
        assert made[layer].measured == pytest.approx(made[layer].predicted)
        assert copied[layer].measured < made[layer].measured <= before.measured
        assert copied[layer].measured < 1.2
        assert copied[layer].measured == pytest.approx(copied[layer].predicted, rel=0.1)
    last = [*even][-1]
    assert made[last].hop_rows <= even[last].hop_rows


def dispatched(path: str) -> tuple[list[int], list[int], Routing]:
    """Rows this rank's experts get in each layer, and rows it sends, of its own part of the tokens."""
    pair = Pair.of(case(f"dp2 ep2,placement={path}", "qwen3_moe"))
    for model in (pair.reference, pair.model):
        skewed(model)
    ids = tokens(*IDS)
    mine = ids[coordinate(pair.model)][None]
    with Trace() as trace:
        seen = recorded(pair.model, mine)
    sent = [e.sent_bytes // (48 * 8) for e in trace.events if e.op == "all_to_all"]
    own = pair.model.model.layers[0].mlp.experts._plait_experts.place
    assert own.held == len(own.homes.ranks[coordinate(pair.model)])
    return sent[::2], sent[1::2], seen


def test_what_is_promised_is_what_is_sent(tmp_path: Path) -> None:
    routing = recorded(skewed(tiny("qwen3_moe")), tokens(*IDS))
    placed = {n: balanced(routing.loads(n).tolist(), 2, 1) for n in routing.experts}
    write_placements(tmp_path / "made.json", placed)
    (answers,) = zip(*run_calls([(dispatched, str(tmp_path / "made.json"))], 2), strict=True)
    told = weigh(routing, placed)
    for number, layer in enumerate(placed):
        assert sum(there[number] for there, _, _ in answers) == told[layer].sent_rows > 0
        assert sum(back[number] for _, back, _ in answers) == told[layer].sent_rows
        seen = torch.cat([part.chosen[layer] for *_, part in answers])
        assert torch.equal(seen, routing.chosen[layer]), "a cut model records the same"


def test_the_command(routing: Routing, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.safetensors", tmp_path / "out.json"
    routing.save(trace)
    for method in ("eplb", "moetuner"):
        call = ["experts", str(trace), "--ranks", "4", "--method", method, "--out", str(out)]
        shown = CliRunner().invoke(app, [*call, "--row-bytes", "96"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        assert "layers.1.mlp.experts" in shown.output
        assert read_placements(out).keys() == routing.experts.keys()
    wrong = CliRunner().invoke(app, ["experts", str(trace), "--method", "best"])
    assert wrong.exit_code == 2
    assert "use one of: eplb, moetuner" in wrong.output
    assert imbalance(torch.zeros(3)) == 1.0
