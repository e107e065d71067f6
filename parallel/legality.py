"""Legality of a plan, from the plan and the model's shape alone.

Pure functions: every rank that asks the same gets the same `PlanError`, before any collective.
What would do is found by asking the same rules about other sizes, so it cannot disagree with them.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any

from .axes import AXES, Choice
from .errors import PlanError, listed
from .shape import ModelShape

if TYPE_CHECKING:
    from .plan import Plan

UNKNOWN = ModelShape(experts=None)


def validate(plan: Plan, shape: ModelShape | None = None, world_size: int | None = None) -> None:
    """Raise PlanError unless the plan is legal for this shape and world size."""
    shape = shape or UNKNOWN
    for choice in choices(plan):
        choice.validate(plan, shape)
    check_experts(plan, shape)
    expert_replicas(plan)
    if world_size is not None:
        check_world(plan, world_size)


def choices(plan: Plan) -> list[Choice]:
    """Return the plan's choice objects, tp first: its rules are the narrowest."""
    return [getattr(plan, axis) for axis in reversed(list(AXES)) if AXES[axis]]


def legal_sizes(choice: Choice, plan: Plan, shape: ModelShape, **options: Any) -> list[int]:
    """Return the sizes this choice could have, the other axes of the plan as they are.

    Sizes for which every choice of the plan is legal; where no size helps the others, those for
    which this one is.
    """
    own, all_of = [], []
    most = max(shape.heads or 1, shape.kv_heads or 1, shape.layers or 1)
    for size in range(1, most + 1):
        other = replace(choice, size=size, **options)  # type: ignore[type-var]
        changed: dict[str, Any] = {choice.axis: other}
        twin = {"cp": "kvp", "kvp": "cp"}.get(choice.axis)
        if twin and getattr(plan, twin).size > 1:  # one axis, two names: they move together
            changed[twin] = replace(getattr(plan, twin), size=size)
        tried = replace(plan, **changed)
        if other.problem(tried, shape) is None:
            own.append(size)
            if all(each.problem(tried, shape) is None for each in choices(tried)):
                all_of.append(size)
    return all_of or own


def remedy(choice: Choice, plan: Plan, shape: ModelShape) -> str:
    """Say which sizes of the axis would do."""
    axis, sizes = choice.axis, legal_sizes(choice, plan, shape)
    said = f"use {axis} in {listed(sizes)}" if sizes else f"change the axes that {axis} meets"
    if axis == "tp" and plan.kvp.size == 1 and not plan.tp.replicate_kv:
        copied = legal_sizes(choice, plan, shape, replicate_kv=True)
        more = [size for size in copied if size not in sizes]
        if choice.size in more:
            said += f" or {replace(plan.tp, replicate_kv=True).text()}"
        elif more:
            said += f" or, with replicate_kv=true, tp in {listed(more)}"
    return said


def check_experts(plan: Plan, shape: ModelShape) -> None:
    """Refuse expert axes without experts, and an ep that does not divide them."""
    if shape.experts is None or (plan.ep.size == 1 and plan.etp == 1):
        return
    if shape.experts == 0:
        asked = " ".join(f"{n}={s}" for n, s in (("ep", plan.ep.size), ("etp", plan.etp)) if s > 1)
        raise PlanError(asked, "cuts experts, and this model has none", "use ep=1 and etp=1")
    if shape.experts % plan.ep.size and not plan.ep.placement:
        legal = [n for n in divisors(shape.experts) if _folds(plan, n, plan.etp)]
        because = f"does not divide experts={shape.experts}"
        raise PlanError(f"ep={plan.ep.size}", because, f"use ep in {listed(legal or [1])}")


def divisors(number: int, most: int = 4096) -> list[int]:
    """Return the divisors of a positive number up to `most`, ascending."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _folds(plan: Plan, ep: int, etp: int) -> bool:
    return plan.world_size // plan.pp.size % (ep * etp) == 0


def attention_text(plan: Plan) -> str:
    """Print the attention factorization: ``8 = tp2 * kvp4 * dp1 * pp1``."""
    sequence = "kvp" if plan.kvp.size > 1 else "cp"
    parts = " * ".join(f"{axis}{plan.size(axis)}" for axis in ("tp", sequence, "dp", "pp"))
    return f"{plan.world_size} = {parts}"


def expert_replicas(plan: Plan) -> int:
    """Return edp, the number of copies of each expert within a pipeline stage.

    Raises:
        PlanError: when etp * ep does not divide the ranks of a stage.
    """
    stage = plan.world_size // plan.pp.size
    cut = plan.etp * plan.ep.size
    if stage % cut == 0:
        return stage // cut
    experts = f"etp{plan.etp} * ep{plan.ep.size} * edp({stage}/{cut}) * pp{plan.pp.size}"
    because = (
        f"does not fold onto the ranks: attention {attention_text(plan)}, "
        f"experts {plan.world_size} = {experts}, and edp must be whole"
    )
    ep_sizes = [n for n in divisors(stage) if _folds(plan, n, plan.etp)]
    etp_sizes = [n for n in divisors(stage) if _folds(plan, plan.ep.size, n)]
    ways = [f"ep in {listed(ep_sizes)}"] if ep_sizes else []
    ways += [f"etp in {listed(etp_sizes)}"] if etp_sizes else []
    per_dp = stage // plan.dp.size
    ways.append(f"a dp that is a multiple of {cut // gcd(cut, per_dp)}")
    raise PlanError(f"ep={plan.ep.size} etp={plan.etp}", because, "use " + " or ".join(ways))


def check_world(plan: Plan, world_size: int) -> None:
    """Refuse a world that is not exactly the plan's ranks."""
    if world_size == plan.world_size:
        return
    because = f"is not the plan's {plan.world_size} ranks ({attention_text(plan)})"
    instead = f"launch {plan.world_size} ranks (torchrun --nproc-per-node {plan.world_size} ...)"
    times, rest = divmod(world_size, plan.world_size)
    if world_size > 0 and rest == 0:
        instead += f", or use dp={plan.dp.size * times}"
    raise PlanError(f"world_size={world_size}", because, instead)
