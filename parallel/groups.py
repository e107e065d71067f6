"""Groups: the communicators of a folding. The only thing here that is alive."""

from __future__ import annotations

from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .communicator import Communicators, LocalCommunicators, TorchCommunicators
from .errors import PlanError
from .folding import Folding
from .legality import check_world
from .plan import Plan


class Groups:
    """Communicators of one rank, made when first asked for, one per distinct set of ranks.

    The whole world reuses the default group, and a set of one rank needs none (None). All members
    of a set must first ask for it in one order; code that runs the same on every rank does, and
    `prepare` fixes the order where it does not. A communicator numbers its ranks in ascending
    order, also for ``ffn_tp``: see folding.py for where that is not the order of the head runs.

    State: owns the communicators it made until `close`; the default group is never its own.
    """

    def __init__(self, folding: Folding, rank: int, maker: Communicators) -> None:
        self.folding = folding
        self.rank = rank
        self._maker: Communicators = maker
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._meshes: dict[tuple[int | str, ...], DeviceMesh] = {}
        self._names = folding.communicators(rank)
        self._axes: dict[str, tuple[str, ...]] = {}  # group name -> the axis sets it serves
        self._closed = False

    @classmethod
    def create(cls, folding: Folding) -> Groups:
        """Take this process' place in an initialised world of exactly the plan's size.

        Collective: none until a group is asked for.

        Raises:
            PlanError: when there is no world, or it has another size.
        """
        if not dist.is_initialized():
            if folding.size == 1:
                return cls(folding, 0, LocalCommunicators(0, fake=False))
            ranks = folding.size
            raise PlanError(
                f"plan {str(folding.plan)!r} of {ranks} ranks",
                "needs torch.distributed, which is not initialised in this process",
                f"call plait.init() first and launch with torchrun --nproc-per-node {ranks} ...",
            )
        check_world(folding.plan, dist.get_world_size())
        return cls(folding, dist.get_rank(), TorchCommunicators())

    @classmethod
    def single(cls) -> Groups:
        """Be a world of one, without torch.distributed: every group is None."""
        return cls(Folding.of(Plan()), 0, LocalCommunicators(0, fake=False))

    @classmethod
    def fake(cls, folding: Folding, rank: int) -> Groups:
        """Play one rank of any world in this process, on meta tensors or for counting only.

        Collectives return at once and their results hold no meaning. ``torch.distributed`` need not
        be initialised, and is not disturbed if it is. Use ``group.rank()`` rather than
        ``dist.get_rank(group)``, which asks the default group.
        """
        folding.attention.coords(rank)  # refuses a rank outside the world
        return cls(folding, rank, LocalCommunicators(rank, fake=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ranks(self, *axes: str) -> tuple[int, ...]:
        """Return the ranks of this rank's group in communicator order (ascending)."""
        return tuple(sorted(self.folding.group(self.rank, *axes)))

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return the communicator along these axes, or None where it would be this rank alone.

        Collective: all ranks of the group at its first use; it may wait for them there.
        """
        return self.of_ranks(self.ranks(*axes))

    def of_ranks(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """Return the communicator of these ranks, of which this one is a member; None if alone."""
        ranks = tuple(sorted(set(ranks)))
        if self.rank not in ranks:
            why = f"leaves out rank {self.rank}, which asks for it"
            raise PlanError(f"a group of ranks {list(ranks)}", why, "ask on its members only")
        return None if len(ranks) == 1 else self._of(ranks)

    def mesh_of(
        self, ranks: tuple[int, ...], name: str, device_type: str | None = None
    ) -> DeviceMesh:
        """Build a DeviceMesh of one dim whose coordinates, and whose communicator, follow this order of ranks.

        In ascending order the group that `of_ranks` gives is reused; any other order is a communicator of its own,
        because DTensor trusts that a rank's place in the communicator is its coordinate.

        Collective: all of these ranks, at first use of the order.
        """
        group = self._of(tuple(ranks))
        device_type = device_type or self._device_type()
        key = (*ranks, name, device_type)
        if key not in self._meshes:
            order = torch.tensor(ranks, dtype=torch.int)
            self._meshes[key] = self._maker.mesh([group], order, (name,), device_type)
        return self._meshes[key]

    def mesh_over(
        self, ranks: tuple[tuple[int, ...], ...], names: tuple[str, str], device_type: str
    ) -> DeviceMesh:
        """Build a DeviceMesh of two dims: this rank's column and row of a table of ranks give the communicators.

        Collective: all of these ranks, at first use of a group that is not made yet.
        """
        row = next(row for row in ranks if self.rank in row)
        column = tuple(each[row.index(self.rank)] for each in ranks)
        key = (*(r for each in ranks for r in each), *names, device_type)
        if key not in self._meshes:
            groups = [self._of(column), self._of(row)]
            order = torch.tensor(ranks, dtype=torch.int)
            self._meshes[key] = self._maker.mesh(groups, order, names, device_type)
        return self._meshes[key]

    def prepare(self, *axis_sets: str | tuple[str, ...]) -> None:
        """Make several groups now, in the order given; all ranks must give the same order."""
        for axes in axis_sets:
            self.group(*((axes,) if isinstance(axes, str) else axes))

    def axes_of(self, group: dist.ProcessGroup | None) -> tuple[str, ...]:
        """Return every axis set a communicator serves, most elementary first."""
        if group is None:
            return ("self",)
        return self._axes.get(group.group_name, (f"group of {group.size()}",))

    def axis_of(self, group: dist.ProcessGroup | None) -> str:
        """Name a communicator for traces: ``tp``, ``kvp``, ``ffn_tp``, ``ep``...

        One set that serves several axes has its most elementary name, the attention side first,
        whichever of them asked: the same on every rank of every run.
        """
        return self.axes_of(group)[0]

    def device_mesh(self, *axes: str, device_type: str | None = None) -> DeviceMesh:
        """Build a DeviceMesh with these dims, in this order, over the groups that exist.

        Coordinates along ``ffn_tp`` are positions in the communicator, not head runs. An axis of
        size 1 gets a communicator of one, the only kind made for this.

        Collective: all ranks along the axes, at first use of a group that is not made yet.
        """
        if not axes:
            raise PlanError("a DeviceMesh of no axes", "has no dims", "name an axis, e.g. tp")
        whole = self.ranks(*axes)
        own = [self._order(axis, self.rank) for axis in axes]
        sizes = [len(order) for order in own]
        if torch.Size(sizes).numel() != len(whole):
            raise PlanError(f"a DeviceMesh of {axes}", "overlaps", "name each axis once")
        mesh = torch.empty(sizes, dtype=torch.int)
        for rank in whole:
            mesh[tuple(self._order(axis, rank).index(rank) for axis in axes)] = rank
        groups = [self._of(order) for order in own]
        device_type = device_type or self._device_type()
        made = self._meshes[*axes, device_type] = self._maker.mesh(groups, mesh, axes, device_type)
        return made

    @property
    def count(self) -> int:
        """Number of communicators made here (the default group is not counted)."""
        whole = self._maker.whole()
        return sum(group is not whole for group in self._made.values())

    @property
    def made(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        """The communicators in use so far: their ranks, and every axis set they serve."""
        return {ranks: self.axes_of(group) for ranks, group in self._made.items()}

    def close(self) -> None:
        """End the communicators made here, newest first. No group can be asked for afterwards.

        Collective: all members, as for making them.
        """
        whole = self._maker.whole()
        for group in reversed(self._made.values()):
            if group is not whole:
                self._maker.end(group)
        self._made.clear()
        if self._meshes:
            # DTensor remembers results by mesh, and a mesh over new groups of the same ranks equals the old one:
            # without this it would hand out the communicators that end here.
            from torch.distributed.tensor.debug import _clear_sharding_prop_cache

            _clear_sharding_prop_cache()
        self._meshes.clear()
        self._closed = True

    def _order(self, axis: str, rank: int) -> tuple[int, ...]:
        return tuple(sorted(self.folding.group(rank, axis)))

    def _of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if self._closed:
            raise RuntimeError("these groups are closed; make new ones with Groups.create(folding)")
        group = self._made.get(ranks)
        if group is None:
            everyone = ranks == tuple(range(self.folding.size))
            whole = self._maker.whole() if everyone else None
            group = whole or self._maker.make(ranks)
            self._made[ranks] = group
            names = self._names.get(ranks) or [f"ranks {','.join(map(str, ranks))}"]
            self._axes[group.group_name] = tuple(names)
        return group

    def _device_type(self) -> str:
        """Say where the tensors of a mesh are; without a world of one backend, on the CPU."""
        whole = self._maker.whole()
        return "cuda" if whole is not None and "nccl" in dist.get_backend(whole) else "cpu"
