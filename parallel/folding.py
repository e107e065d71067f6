"""Folding: the same ranks seen by attention (tp cp dp pp) and by experts (etp ep edp pp).

Fastest axis first, pipeline outermost (Megatron's MoE Parallel Folding):

    attention:  rank = tp + TP * (cp + CP * (dp + DP * pp))
    experts:    rank = etp + ETP * (ep + EP * (edp + EDP * pp))

Two orders of the ffn_tp ranks exist and they are not the same. *Group order* is ascending rank
(tp fastest); communicators have it. *Run order* is the order of query heads after Helix's
all-to-all (kvp fastest): rank (tp t, kvp k) owns run ``t * KVP + k`` of N equal runs. A sum does
not care. A shard of the output projection, and any gather or scatter along heads over ffn_tp,
must go by `Folding.head_run`, never by the position in the group. With kvp=1 or tp=1 they agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import PlanError, unknown
from .legality import expert_replicas
from .mesh import Mesh

if TYPE_CHECKING:
    from .plan import Plan

ATTENTION = ("tp", "cp", "dp", "pp")
EXPERTS = ("etp", "ep", "edp", "pp")
# The axis sets that code communicates over, most elementary first: the order names are given in.
USED = (
    ("tp",), ("cp",), ("dp",), ("pp",), ("tp", "cp"), ("cp", "dp"), ("tp", "dp"),
    ("tp", "cp", "dp"), ("etp",), ("ep",), ("edp",), ("etp", "ep"), ("ep", "edp"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Folding:
    """Both meshes of a plan, and the groups of ranks on either side.

    >>> from .plan import Plan
    >>> fold = Folding.of(Plan.parse("kvp2 tp2"))
    >>> [fold.head_run(rank) for rank in range(4)]
    [0, 2, 1, 3]
    >>> fold.group(0, "ffn_tp"), fold.group(0, "tp", "kvp")
    ((0, 2, 1, 3), (0, 1, 2, 3))
    """

    plan: Plan
    attention: Mesh
    experts: Mesh

    @classmethod
    def of(cls, plan: Plan) -> Folding:
        """Fold a plan's ranks.

        Raises:
            PlanError: when the experts do not fold onto the ranks.
        """
        edp = expert_replicas(plan)
        experts = {"etp": plan.etp, "ep": plan.ep.size, "edp": edp, "pp": plan.pp.size}
        return cls(
            plan=plan,
            attention=Mesh(tuple((axis, plan.size(axis)) for axis in ATTENTION)),
            experts=Mesh(tuple(experts.items())),
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.attention.size

    def coords(self, rank: int) -> dict[str, int]:
        """Return a rank's coordinates on both sides; ``kvp`` is cp's under Helix, else 0."""
        both = {**self.attention.coords(rank), **self.experts.coords(rank)}
        return {**both, "kvp": both["cp"] if self.plan.kvp.size > 1 else 0}

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Return the ranks that agree with this one on all other axes of the same side.

        ``kvp`` is cp under Helix and nothing otherwise; ``world`` is every rank. ``ffn_tp`` alone
        is all kvp * tp ranks in *run order*; beside other axes it stands for tp and kvp. All
        but ``ffn_tp`` alone is in ascending rank order, which is the communicator's order.
        """
        if axes == ("ffn_tp",):
            return tuple(sorted(self.group(rank, "tp", "kvp"), key=self.head_run))
        mesh, plain = self._resolve(axes)
        return mesh.group(rank, *plain)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Return every group along these axes; each ordered as `group` orders it."""
        mesh, plain = self._resolve(axes)
        return tuple(self.group(ranks[0], *axes) for ranks in mesh.groups(*plain))

    def index(self, rank: int, *axes: str) -> int:
        """Return the position of a rank in `group`: the head run for ``ffn_tp`` alone."""
        return self.group(rank, *axes).index(rank)

    def neighbours(self, rank: int, axis: str) -> tuple[int, int]:
        """Return the previous and next rank around the ring of one axis."""
        ring = self.group(rank, axis)
        at = ring.index(rank)
        return ring[at - 1], ring[(at + 1) % len(ring)]

    def head_run(self, rank: int) -> int:
        """Return which of the kvp * tp equal runs of query heads the rank owns after Helix's
        all-to-all: ``t * KVP + k``, from coordinates, never from the rank number.
        """
        at = self.coords(rank)
        return at["tp"] * self.plan.kvp.size + at["kvp"]

    def head_runs(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Return the head run of each of these ranks, in their order."""
        return tuple(self.head_run(rank) for rank in ranks)

    def communicators(self, rank: int | None = None) -> dict[tuple[int, ...], list[str]]:
        """Return every distinct set of two or more ranks and the axis sets that it serves.

        Both sides share: with ep=tp, one set is ``["tp", "ep"]``. Keys are in ascending rank
        order, most elementary name first. With `rank`, only the sets it belongs to. An upper
        bound: `Groups` makes a communicator only when it is asked for.
        """
        sets: dict[tuple[int, ...], list[str]] = {}
        for used in USED:
            mesh, _ = self._resolve(used)
            axes = tuple(axis for axis in used if mesh.axis_size(axis) > 1)
            name = self._name(axes)
            groups = self.groups(*axes) if rank is None else (self.group(rank, *axes),)
            for ranks in groups:
                if len(ranks) > 1 and name not in sets.setdefault(ranks, []):
                    sets[ranks].append(name)
        everyone = tuple(range(self.size))
        if self.size > 1:
            sets.setdefault(everyone, []).append("world")
        return sets

    def picture(self) -> str:
        """Draw both meshes."""
        renamed = tuple((self._name((axis,)), size) for axis, size in self.attention.axes)
        sides = [("attention", Mesh(renamed))]
        if self.plan.ep.size > 1 or self.plan.etp > 1:
            sides.append(("experts", self.experts))
        lines = []
        for side, mesh in sides:
            sizes = " ".join(f"{axis}{size}" for axis, size in mesh.axes)
            lines += [f"{side} ({sizes})", mesh.picture()]
        return "\n".join(lines)

    def _name(self, axes: tuple[str, ...]) -> str:
        if self.plan.kvp.size == 1:
            return "+".join(axes)
        if axes == ("tp", "cp"):
            return "ffn_tp"
        return "+".join("kvp" if axis == "cp" else axis for axis in axes)

    def _resolve(self, axes: tuple[str, ...]) -> tuple[Mesh, tuple[str, ...]]:
        """Find the side that these axes are of, and write them in its own names."""
        helix = self.plan.kvp.size > 1
        same = {"kvp": ("cp",) if helix else (), "world": ATTENTION}
        same["ffn_tp"] = ("tp", *same["kvp"])
        for axis in axes:
            if axis not in {*ATTENTION, *EXPERTS, *same}:
                raise unknown("axis", axis, [*ATTENTION, *EXPERTS[:-1], *same])
        plain = tuple(dict.fromkeys(own for axis in axes for own in same.get(axis, (axis,))))
        for mesh, names in ((self.attention, ATTENTION), (self.experts, EXPERTS)):
            if set(plain) <= set(names):
                return mesh, plain
        raise PlanError(
            f"a group along {' and '.join(axes)}",
            "mixes the attention and the expert mesh",
            f"use axes of one side: {' '.join(ATTENTION)}, or {' '.join(EXPERTS)}",
        )
