"""Ranks among which parameters are shared out, as one of them sees it: those of one model copy, or of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..collectives import primitive
from ..collectives.primitive import Group
from .groups import Groups
from .layout import Cut
from .plan import Plan
from .tensor import SequenceSpan

if TYPE_CHECKING:
    from .attention.helix import HelixState


@dataclass(frozen=True)
class Holders:
    """The ranks along ``axes``, which share a dim of a parameter out; this rank is number ``index`` of ``members``.

    ``run_order[j]`` is the number of the equal chunk that rank j takes.
    """

    groups: Groups
    axes: tuple[str, ...]
    members: tuple[int, ...]
    index: int
    run_order: tuple[int, ...]

    @classmethod
    def along(cls, groups: Groups, *axes: str) -> Holders:
        """The ranks along some axes, whose chunks are in the order of the ranks."""
        members = groups.ranks(*axes)
        order = tuple(range(len(members)))
        return cls(groups, axes, members, members.index(groups.rank), order)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.members)

    @cached_property
    def all(self) -> Group:
        """Their group, in order of index."""
        return self.groups.of_ranks(self.members)

    def index_of(self, rank: int) -> int:
        """The index that any rank of the world has among those along the same axes."""
        return sorted(self.groups.folding.group(rank, *self.axes)).index(rank)

    def gather(self, local: Tensor, cut: Cut) -> Tensor:
        """Put a cut tensor together on every rank.

        Collective: these ranks; an all-gather padded to the largest part.
        """
        sizes = [cut.extent(j) for j in range(self.size)]
        whole = primitive.all_gather(local, self.all, sizes, cut.dim)
        return cut.join(torch.split(whole, sizes, cut.dim))


@dataclass(frozen=True)
class Placed:
    """A cut, and the ranks that hold its parts; None: the ranks of the model copy."""

    cut: Cut
    holders: Holders | None = None


@dataclass(frozen=True)
class ModelRanks(Holders):
    """The tp * kvp ranks of one model copy; rank ``index`` is ``t + tp * k``.

    ``tp_order[j]`` is the tp coordinate of rank j, ``run_order[j]`` the number ``t * kvp + k`` of the run of query
    heads (and of FFN columns) that rank j keeps after Helix's all-to-all. Cuts are made by these orders, never by rank
    number.
    """

    plan: Plan
    tp_order: tuple[int, ...]
    span: SequenceSpan | None = None
    attention: HelixState | None = None

    @classmethod
    def of(cls, plan: Plan, groups: Groups) -> ModelRanks:
        """Read this rank's coordinates from the groups of a plan."""
        folding = groups.folding
        members = folding.group(groups.rank, "tp", "kvp")
        return cls(
            plan=plan,
            axes=("tp", "kvp"),
            index=members.index(groups.rank),
            groups=groups,
            members=members,
            tp_order=tuple(folding.coords(r)["tp"] for r in members),
            run_order=folding.head_runs(members),
            span=SequenceSpan() if plan.tp.sp and plan.tp.size > 1 else None,
        )

    @property
    def tp(self) -> int:
        """Size of the tensor axis."""
        return self.plan.tp.size

    @property
    def kvp(self) -> int:
        """Size of the KV axis."""
        return self.plan.kvp.size

    @property
    def cp(self) -> int:
        """Size of the axis along which Ring and Ulysses cut the sequence; 1 under Helix, which cuts it its own way."""
        return self.plan.cp.size if self.kvp == 1 else 1

    @property
    def ulysses(self) -> int:
        """Ranks of cp that exchange heads for tokens."""
        return self.plan.cp.ulysses

    @property
    def sharded(self) -> bool:
        """Whether parameters are cut over dp between their uses (FSDP2)."""
        return self.plan.dp.size > 1 and self.plan.dp.kind == "shard"

    def dp_rows(self, part: Tensor) -> Tensor:
        """The rows of a part that this rank holds between its uses, by torch.chunk's rule, as FSDP2 cuts them.

        Shape: [part, ...] -> [part/dp, ...]
        """
        sizes = primitive.chunk_sizes(part.shape[0], self.plan.dp.size)
        at = self.groups.folding.coords(self.groups.rank)["dp"]
        return part.narrow(0, sum(sizes[:at]), sizes[at])

    @property
    def spread(self) -> bool:
        """Whether one copy's ranks do not hold a whole model: dp shards it, or experts lie beyond."""
        return self.sharded or self.size % (self.plan.size("ep") * self.plan.etp) > 0

    @property
    def helix(self) -> HelixState | None:
        """What Helix layers share; None without a KV axis."""
        return self.attention if self.kvp > 1 else None

    @property
    def t(self) -> int:
        """This rank's tp coordinate."""
        return self.index % self.tp

    @property
    def k(self) -> int:
        """This rank's kvp coordinate."""
        return self.index // self.tp

    @property
    def run(self) -> int:
        """The run of query heads this rank keeps."""
        return self.run_order[self.index]

    @cached_property
    def holders(self) -> Group:
        """The ranks that hold one whole model between them: the copy's, or those along cp and dp too."""
        return self.groups.group("tp", "cp", "dp") if self.spread else self.all

    @cached_property
    def inputs(self) -> Group:
        """The ranks that are given the same input: those of the model copy, of cp, and of all stages."""
        return self.groups.group("tp", "cp", "pp")

    @cached_property
    def kvp_group(self) -> Group:
        """The group along which the KV cache is cut, in order of k."""
        return self.groups.group("kvp")

    def subset(self, indices: Sequence[int]) -> Group:
        """The group of some ranks of the model copy, named by index."""
        return self.groups.of_ranks(tuple(self.members[j] for j in indices))
