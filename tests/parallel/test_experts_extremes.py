"""Routing that breaks dispatchers, in every way of bringing tokens and experts together: exact, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactness import EXACT, worst
from plait.parallel.experts.placement import Placement, write_placements
from routing_extremes import nan_logits, one_way, single_token
from world import run_calls

LAYERS = [f"model.layers.{n}.mlp.experts" for n in range(2)]


def test_extremes(tmp_path: Path) -> None:
    copied = str(tmp_path / "copied.json")
    write_placements(copied, {n: Placement(4, ((3, 0, 1), (2, 1))) for n in LAYERS})
    plans = [
        "dp2 ep2,capacity=9.0,pad=true",
        "tp2 ep2,capacity=9.0,pad=true",
        "dp2 ep2,nodes=2",
        "tp2 ep2,nodes=2",
        "dp2 ep2:fssdp,spare=2",
        "tp2 ep2:fssdp,spare=1",
        f"dp2 ep2,placement={copied}",
        f"tp2 ep2,placement={copied}",
    ]
    calls: list[Any] = []
    for plan in plans:
        calls += [(one_way, plan, 2), (single_token, plan, "gpt_oss", 2), (nan_logits, plan, True)]
    answers = run_calls(calls, 2)
    for i, call in enumerate(calls):
        errors = worst([answer[i] for answer in answers])
        print(call[0].__name__, call[1], errors)
        assert max(errors.values()) < EXACT, call
