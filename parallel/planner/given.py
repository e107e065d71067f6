"""A plan that is given: priced alone, or refused with the nearest plan that is legal and fits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import PlanError
from ..legality import validate
from ..plan import Plan
from . import search
from .answer import Answer, out_of_reach
from .candidates import crossed, grids, one
from .catalogue import hardware
from .ffn_cost import Coverage
from .goals import Goal
from .hardware import Hardware
from .proposals import proposal
from .reading import decoder
from .shapes import Decoder


def check(
    model: Any, part: str | Hardware, goal: Goal, plan: Plan, batch: int = 1, cover: Coverage | None = None
) -> Answer:  # fmt: skip
    """Price the decode steps of one plan that is given.

    Raises:
        PlanError: the plan is illegal, too large, or does not fit; with the nearest plan that is and does.
    """
    known, chip = decoder(model), hardware(part) if isinstance(part, str) else part
    (machine, *_) = search.machines(chip, goal, cover=cover)
    try:
        validate(plan, known.shape)
    except PlanError as error:
        near = nearest_plan(known, plan, goal.ranks)
        raise PlanError(
            error.asked, error.because, f"{error.instead}; the nearest legal plan is '{near}'"
        ) from None
    points = search.priced(known, machine, goal, one(plan, batch))
    if points.memory[0] > chip.memory.value:
        near = _nearest_fitting(known, machine, goal, plan)
        raise PlanError(
            f"plan '{plan}' with batch {batch}",
            f"needs {points.memory[0] / 1e9:,.0f} GB a rank and {chip.title} has {chip.memory.value / 1e9:,.0f}",
            f"the nearest plan that fits is '{near}'" if near else "nothing fits on so many ranks",
        )
    rows = (proposal(known, chip, goal, points, 0),)
    met = bool(len(search.within(points, goal)))
    return Answer(
        known.name, chip.title, goal, rows, rows, met, "" if met else out_of_reach(goal, rows[0])
    )


def _distance(plan: Plan, rows: Any) -> Any:
    sizes = [
        plan.tp.size,
        plan.kvp.size,
        plan.size("cp") // plan.kvp.size,
        plan.dp.size,
        plan.pp.size,
        plan.ep.size,
        plan.etp,
    ]
    return np.abs(np.log2(rows) - np.log2(np.array(sizes, float))).sum(axis=1)


def nearest_plan(model: Decoder, plan: Plan, ranks: int) -> Plan:
    """Return the legal plan of at most so many ranks whose axes differ least, in powers of two."""
    most = min(plan.world_size, ranks)
    rows = np.concatenate([grids(model, most), grids(model, most, whole=False)])
    best = rows[_distance(plan, rows).argmin()]
    return crossed(best[None], (1,)).plan(0, model.shape)


def _nearest_fitting(model: Decoder, machine: Any, goal: Goal, plan: Plan) -> Plan | None:
    points = search.decode_points(model, machine, goal)
    if not len(points):
        return None
    c = points.candidates
    rows = np.stack([c.tp, c.kvp, c.cp, c.dp, c.pp, c.ep, c.etp], axis=1)
    return c.plan(int(_distance(plan, rows).argmin()), model.shape)
