"""Where a rank stands among the ranks that share the experts, and which tokens it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...collectives import autograd
from ...collectives.primitive import Group
from ..ranks import Holders, ModelRanks
from .placement import Placement


@dataclass(frozen=True)
class Place:
    """One rank's place in the expert mesh of its stage.

    Attributes:
        along_ep, along_etp: the ranks that share out the experts, and each expert's matrices.
        owners: both together, etp fastest; rows travel among them.
        alike: the ranks that bring the same tokens; None: each brings its own.
        replicas: the ranks that hold the same experts; their gradients are summed.
        homes: which ep rank holds which experts.
    """

    along_ep: Holders
    along_etp: Holders
    owners: Holders
    alike: Holders | None
    replicas: Group
    homes: Placement

    @classmethod
    def of(cls, ranks: ModelRanks, homes: Placement) -> Place:
        """Read this rank's place from the groups of a plan."""
        groups = ranks.groups
        # under sp the ranks of tp hold tokens of their own
        split = ranks.size > 1 and ranks.span is None
        return cls(
            along_ep=Holders.along(groups, "ep"),
            along_etp=Holders.along(groups, "etp"),
            owners=Holders.along(groups, "etp", "ep"),
            alike=ranks if split else None,
            replicas=groups.group("edp"),
            homes=homes,
        )

    @property
    def etp(self) -> int:
        """Ranks that share each expert."""
        return self.along_etp.size

    @property
    def experts(self) -> int:
        """How many experts there are in all."""
        return self.homes.experts

    @property
    def held(self) -> int:
        """Number of experts this rank holds."""
        return self.homes.sizes[self.along_ep.index]

    @property
    def first(self) -> int:
        """The first slot of this rank."""
        return self.homes.first(self.along_ep.index)

    @property
    def turn(self) -> int:
        """Which of an expert's copies the tokens here begin with; the same on all ranks that bring these tokens."""
        return self.along_ep.groups.rank if self.alike is None else self.alike.members[0]

    @property
    def shares(self) -> tuple[int, int]:
        """Which share of the common tokens this rank's experts work on, and of how many, when sums are exchanged."""
        assert self.alike is not None
        return self.alike.index // self.owners.size, self.alike.size // self.owners.size

    @property
    def sums(self) -> bool:
        """Whether the ranks that share the experts all hold the same tokens, so that only results need to travel."""
        return self.alike is not None and self.alike.size % self.owners.size == 0

    def sum(self, partial: Tensor) -> Tensor:
        """Sum what the ranks that bring the same tokens made of them.

        Collective: those ranks; one all-reduce forward, none backward.
        """
        assert self.alike is not None
        return autograd.leave(partial, self.alike.all)
