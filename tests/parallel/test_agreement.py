"""Ranks find out that they were told different things, or that one of them failed, however much there is to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from plait.parallel.agreement import RanksDisagree, agree
from plait.parallel.errors import PlanError
from world import run_world

LONG = "\N{SNOWMAN}\nx" * 3000  # more than travels


def said(facts: dict[str, str], failure: Exception | None = None) -> str:
    try:
        agree(dist.group.WORLD, facts, failure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "agreed"


def long_facts() -> list[str]:
    own = str(dist.get_rank())
    failure = ValueError("my own " + LONG) if own == "1" else None
    return [
        said({"rules": LONG, "times": "same"}),
        said({"rules": LONG + own, "times": "same"}),
        said({"rules": LONG, "times": own}),
        said({"rules": LONG, "plan": LONG, "times": LONG}, failure),
    ]


def test_long_facts_are_compared_whole_and_hide_nothing() -> None:
    first, second = run_world(long_facts, 2)
    for same, rules, times, _ in (first, second):
        assert same == "agreed"
        assert rules.startswith("RanksDisagree: the rules")
        assert times.startswith("RanksDisagree: the times")
    assert first[3].startswith("PlanError: rank 1 of 2 failed: ValueError: my own")
    assert second[3].startswith("ValueError: my own")


def test_alone_a_failure_is_raised_as_it_is() -> None:
    agree(None, {"plan": "tp2"})
    failure: Any = PlanError("tp=3", "does not fit", "use tp=2")
    with pytest.raises(PlanError) as raised:
        agree(None, {}, failure)
    assert raised.value is failure
    assert not isinstance(failure, RanksDisagree)
