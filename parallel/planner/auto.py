"""auto: the plan for a model on so many ranks, without a person in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..plan import Plan
from . import search
from .answer import answer
from .catalogue import catalogue
from .catalogue import hardware as part_named
from .goals import Goal
from .hardware import Hardware
from .reading import decoder


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


def here(model: Any, ranks: int, *, context: int = 8192, device_name: str = "") -> Plan:
    """Return the plan that ``parallelize(model, "auto")`` takes: least time per token on this hardware, one request.

    A pure function of its arguments, so every rank finds the same plan: the hardware is told by the name that torch
    gives the device, and what is not in the catalogue is taken as ``cpu``. Only axes that run today are used.
    """
    words = device_name.lower().replace("-", " ").split()
    part = next((catalogue()[word] for word in words if word in catalogue()), catalogue()["cpu"])
    known = decoder(model)
    axes = ("tp", "kvp", "etp")
    for weight in ("bf16", "fp8"):
        goal = Goal(ranks=ranks, context=context, weights=(weight,), axes=axes)
        for points in search.sweep(known, part, goal):
            c = points.candidates
            fit = points.take((points.used == ranks) & (c.batch == 1) & (c.chunks == 1))
            if len(fit):
                return fit.candidates.plan(int(fit.ttl.argmin()), known.shape)
    raise PlanError(
        f"a plan of {ranks} ranks of {part.title}",
        "fits by none of the axes that run today",
        "give a plan, fewer ranks or another model",
    )
