"""Plan: how one model is cut over ranks. Data only; equal on all ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any

from . import legality
from . import text as plan_text
from .axes import AXES, Experts, Helix, Pipeline, Replicate, Ring, Shard, Tensor, Ulysses, normal
from .errors import PlanError, unknown

if TYPE_CHECKING:
    from .shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan:
    """Say how many ranks each axis has, and how it is done.

    An integer means the default choice of the axis and becomes that object, so ``plan.tp.size``
    and ``plan.tp.sp`` always work and ``Plan(tp=2) == Plan(tp=Tensor(2))``. ``kvp`` and ``cp`` name
    the same ranks: kvp alone is enough; both given must be equal.

    >>> plan = Plan(kvp=4, tp=2, ep=4, etp=2)
    >>> str(plan), plan.world_size, plan.size("cp"), plan.size("edp")
    ('kvp4 tp2 ep4 etp2', 8, 4, 1)
    >>> Plan.parse(str(plan)) == plan
    True

    Raises:
        PlanError: for a size or option that can never be. What depends on the model, on the world
            or on the folding is checked by `validate`.
    """

    dp: Replicate | Shard = 1  # type: ignore[assignment]
    tp: Tensor = 1  # type: ignore[assignment]
    cp: Ring | Ulysses = 1  # type: ignore[assignment]
    kvp: Helix = 1  # type: ignore[assignment]
    pp: Pipeline = 1  # type: ignore[assignment]
    ep: Experts = 1  # type: ignore[assignment]
    etp: int = 1

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            dp: int | Replicate | Shard = 1,
            tp: int | Tensor = 1,
            cp: int | Ring | Ulysses = 1,
            kvp: int | Helix = 1,
            pp: int | Pipeline = 1,
            ep: int | Experts = 1,
            etp: int = 1,
        ) -> None: ...

    def __post_init__(self) -> None:
        for axis in AXES:
            object.__setattr__(self, axis, normal(axis, getattr(self, axis)))
        if 1 not in (self.cp.size, self.kvp.size) and self.cp.size != self.kvp.size:
            raise PlanError(
                f"cp={self.cp.size} with kvp={self.kvp.size}",
                "cannot be: they are the same axis (prefill and decode over the same ranks)",
                f"use cp={self.kvp.size}, kvp={self.cp.size}, or give kvp alone",
            )

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the text form, e.g. ``tp2:sp cp4:ring ep8 etp1``."""
        return cls(**plan_text.parse(text))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote."""
        return cls(**plan_text.from_json(text))

    def to_json(self) -> str:
        """Write the plan as a JSON object of axes."""
        return plan_text.to_json(self._values())

    def __str__(self) -> str:
        said = plan_text.spoken(self._values())
        return " ".join(plan_text.show(axis, choice) for axis, choice in said.items())

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})"

    def digest(self) -> str:
        """Return the SHA-256 of the text form: the same in every process for equal plans."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    @property
    def world_size(self) -> int:
        """The number of ranks: tp * cp * dp * pp, where kvp is cp."""
        return prod(self.size(axis) for axis in ("tp", "cp", "dp", "pp"))

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and residuals are cut along the sequence over tp (``tp2:sp``)."""
        return self.tp.sp and self.tp.size > 1

    @property
    def cuts_experts(self) -> bool:
        """Whether experts are shared out over ranks (ep), or each one's matrices (etp)."""
        return self.ep.size * self.etp > 1

    def size(self, axis: str) -> int:
        """Return the number of ranks along an axis.

        ``cp`` is the axis of ranks whichever of cp and kvp named it; ``kvp`` is 1 unless Helix was
        asked for, so ``size("kvp") > 1`` asks "is this Helix?". ``ffn_tp`` is kvp * tp; ``edp`` is
        derived and raises PlanError when the experts do not fold onto the ranks.
        """
        match axis:
            case "cp":
                return max(self.cp.size, self.kvp.size)
            case "dp" | "tp" | "kvp" | "pp" | "ep":
                return getattr(self, axis).size
            case "etp":
                return self.etp
            case "ffn_tp":
                return self.kvp.size * self.tp.size
            case "edp":
                return legality.expert_replicas(self)
        raise unknown("axis", axis, [*AXES, "edp", "ffn_tp"])

    def coords(self, rank: int) -> dict[str, int]:
        """Return a rank's place along every axis; ``plan.coords(world.rank)["dp"]`` says whose batches it is given.

        >>> Plan.parse("dp2 tp2").coords(2)["dp"]
        1
        """
        from .folding import Folding

        return Folding.of(self).coords(rank)

    def validate(self, shape: ModelShape | None = None, world_size: int | None = None) -> None:
        """Raise PlanError unless the plan is legal, for the model and the world where given.

        Collective: none. A pure function of its arguments, so every rank raises the same text.
        """
        legality.validate(self, shape, world_size)

    def fit(self, world_size: int, shape: ModelShape | None = None) -> Plan:
        """Find the plan most like this one for another number of ranks: after a restart with fewer or more.

        >>> str(Plan.parse("dp4 tp2").fit(4)), str(Plan.parse("pp2 tp2").fit(2))
        ('dp2 tp2', 'tp2')

        Raises:
            PlanError: none of these axes fits so many ranks.
        """
        from .elastic import fit

        return fit(self, world_size, shape)

    @classmethod
    def auto(cls, model: Any, *, hardware: Any, goal: Any) -> Plan:
        """Find the best plan for a ``planner.goals.Goal`` on some hardware, by name or as calibrated.

        Raises:
            PlanError: nothing fits, or nothing is in time; says what would be.
        """
        from .planner.auto import auto

        return auto(model, hardware=hardware, goal=goal)

    def explain(self, model: Any, **options: Any) -> Any:
        """Say what each rank would hold and send; needs no ranks."""
        from .explain import explain

        return explain(self, model, **options)

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
