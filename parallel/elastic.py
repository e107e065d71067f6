"""A plan for another number of ranks: after a restart with fewer or more of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log2
from typing import TYPE_CHECKING

from .axes import whole
from .errors import PlanError
from .legality import divisors
from .shape import ModelShape

if TYPE_CHECKING:
    from .plan import Plan

MODEL_AXES = ("tp", "cp", "kvp", "pp", "ep", "etp")


def fit(plan: Plan, world_size: int, shape: ModelShape | None = None) -> Plan:
    """Find the plan for ``world_size`` ranks that is most like this one: the same choices, other sizes.

    dp takes what the other axes leave, so they stay as they are where the world is a multiple of them. Where it is not,
    they change by as few doublings or halvings as can be; no axis of size 1 but dp grows. Of equals the earlier in the
    order tp, cp, kvp, pp, ep, etp keeps its size.

    Args:
        shape: the model's, e.g. ``ModelShape.from_config(model.config)``; without it only the ranks must fit.

    Raises:
        PlanError: no size of these axes is legal for so many ranks.
    """
    whole("world_size", world_size)
    best: tuple[tuple[float, ...], Plan] | None = None
    for sizes in _candidates(plan, world_size):
        found = _with_sizes(plan, sizes, world_size)
        try:
            found.validate(shape, world_size)
        except PlanError:
            continue
        moved = [abs(log2(sizes[a] / plan.size(a))) for a in MODEL_AXES if a in sizes]
        score = (sum(moved), *moved)
        if best is None or score < best[0]:
            best = score, found
    if best is None:
        raise PlanError(
            f"{plan} on {world_size} ranks",
            "has no legal sizes of the same axes",
            "use another number of ranks, or another plan",
        )
    return best[1]


def _candidates(plan: Plan, world_size: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes in use; those of attention must divide the world together."""
    used = [a for a in MODEL_AXES if plan.size(a) > 1 and not (a == "cp" and plan.kvp.size > 1)]

    def choose(axes: list[str], left: int, sizes: dict[str, int]) -> Iterator[dict[str, int]]:
        if not axes:
            yield sizes
            return
        for size in divisors(world_size if axes[0] in {"ep", "etp"} else left):
            rest = left if axes[0] in {"ep", "etp"} else left // size
            yield from choose(axes[1:], rest, {**sizes, axes[0]: size})

    yield from choose(used, world_size, {})


def _with_sizes(plan: Plan, sizes: dict[str, int], world_size: int) -> Plan:
    changed: dict[str, object] = {}
    ranks = 1
    for axis, size in sizes.items():
        choice = getattr(plan, axis)
        changed[axis] = size if isinstance(choice, int) else replace(choice, size=size)
        ranks *= 1 if axis in {"ep", "etp"} else size
    if plan.kvp.size > 1 and plan.cp.size > 1:
        changed["cp"] = replace(plan.cp, size=sizes["kvp"])
    return replace(plan, dp=replace(plan.dp, size=world_size // ranks), **changed)  # type: ignore[arg-type]
