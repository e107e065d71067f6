"""auto: the plan for a model on so many ranks, without a person in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..plan import Plan
from .answer import answer
from .catalogue import hardware as part_named
from .goals import Goal
from .hardware import Hardware


def auto(model: Any, *, hardware: str | Hardware, goal: Goal) -> Plan:
    """Return the best plan for a goal that uses exactly ``goal.ranks`` ranks.

    Args:
        model: a ModelShape, a transformers model or config, a config.json, or a shipped name.

    Raises:
        PlanError: nothing fits, or nothing is in time (the message says what would be).
    """
    part = part_named(hardware) if isinstance(hardware, str) else hardware
    wish = replace(goal, prompt=0, ftl=None)  # a plan is one set of ranks: no pool beside it
    said = answer(model, part, wish, most=200)
    if not said.reached:
        ways = ", ".join(said.remedies) or "nothing that was tried"
        raise PlanError(
            f"a plan of {goal.ranks} x {part.title}",
            f"is out of reach: {said.why}",
            f"would do: {ways}",
        )
    for row in said.proposals:
        if row.ranks == goal.ranks:
            return Plan.parse(row.plan)
    used = said.proposals[0].ranks
    raise PlanError(
        f"{goal.ranks} ranks", "are used whole by no plan in time", f"use {used} of them"
    )
