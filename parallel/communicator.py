"""Make and end single communicators: over torch.distributed, or of one process for tests and plans.

`Groups` decides which communicators there are; a maker here knows how one is made. Every maker has
``make(ranks) -> ProcessGroup`` and ``end(group)``, and numbers ranks in the order given.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    FakeProcessGroup,
    _register_process_group,
    _unregister_process_group,
)
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from ..collectives.errors import BackendUnavailable
from ..collectives.gloo import NAME as GLOO
from ..collectives.gloo import register as register_gloo
from ..collectives.shm import register as register_shm
from ..collectives.world import CHOSEN
from .errors import PlanError


class Communicators(Protocol):
    """Makes communicators for one rank of a world."""

    def make(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Make the communicator of these ranks, numbered in the order given (ascending but for `Groups.mesh_of`)."""
        ...

    def end(self, group: dist.ProcessGroup) -> None:
        """End a communicator that `make` made."""
        ...

    def whole(self) -> dist.ProcessGroup | None:
        """Return the communicator of the whole world if there is one already."""
        ...

    def mesh(
        self,
        groups: list[dist.ProcessGroup],
        ranks: torch.Tensor,
        names: tuple[str, ...],
        device: str,
    ) -> DeviceMesh:
        """Build a DeviceMesh over groups that exist, one per dim of `ranks`."""
        ...


class TorchCommunicators:
    """Real communicators, by ``torch.distributed.new_group``.

    Over shared memory where the world is gloo by default and all members are on one host; else of its backend.
    """

    def __init__(self) -> None:
        self._shares_memory = may_share_memory()

    def make(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Make a communicator.

        Collective: the members only, in one order. No data; gloo and shm connect their members here, NCCL
        at the first collective.
        """
        if self._shares_memory:
            register_shm()
            with suppress(BackendUnavailable):  # several hosts; every member is told the same
                return self._new(ranks, "shm")
        # torch's own gloo names nobody when a rank is lost
        return self._new(ranks, register_gloo() if dist.get_backend() == "gloo" else None)

    def _new(self, ranks: tuple[int, ...], backend: str | None) -> dist.ProcessGroup:
        ordered: dict[str, Any] = {} if list(ranks) == sorted(ranks) else {"sort_ranks": False}
        if ordered and "sort_ranks" not in inspect.signature(dist.new_group).parameters:
            asked = f"a communicator of ranks in the order {list(ranks)}"
            why = f"cannot be made by torch {torch.__version__}"
            raise PlanError(asked, why, "use torch>=2.13, or a plan with tp=1 or kvp=1")
        with _named(_fresh_name(ranks)):
            group = dist.new_group(
                list(ranks), backend=backend, use_local_synchronization=True, **ordered
            )
        assert isinstance(group, dist.ProcessGroup), "called by a rank that is no member"
        return group

    def end(self, group: dist.ProcessGroup) -> None:
        if group in distributed_c10d._world.pg_map:  # else its world is gone and took it along
            dist.destroy_process_group(group)

    def whole(self) -> dist.ProcessGroup | None:
        return None if self._shares_memory else dist.group.WORLD

    def mesh(
        self,
        groups: list[dist.ProcessGroup],
        ranks: torch.Tensor,
        names: tuple[str, ...],
        device: str,
    ) -> DeviceMesh:
        return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=names)


def may_share_memory() -> bool:
    """Say whether groups of this world should be over shared memory: gloo was nobody's choice, and torch has no other.

    ``plait.init("gloo")`` chooses it; see `World`.
    """
    world = dist.group.WORLD
    assert world is not None
    return (
        sys.platform == "linux"
        and dist.get_backend() in ("gloo", GLOO)
        and not world.group_desc.startswith(CHOSEN)
    )


def _fresh_name(ranks: tuple[int, ...]) -> str:
    """Return a name that all members find alone, and that no earlier group of this world had.

    Each member counts its own uses of a set of ranks, in the world's store: the n-th group of a
    set is the n-th for every member.
    """
    members = hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:16]
    uses = distributed_c10d._get_default_store().add(f"plait/{members}/{dist.get_rank()}", 1)
    return f"plait-{members}-{uses}"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Give the group that is made inside this name.

    torch derives the name, under which members find each other in the store, from how many groups
    this rank has: ranks with different counts never meet (pytorch/pytorch#173608), and a set that
    is made again after its end reads the addresses of the dead group. new_group takes no name.
    """
    torch_name = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        yield
    finally:
        distributed_c10d._process_group_name = torch_name


class LocalCommunicators:
    """Communicators without a world: this process plays one rank, and no peer exists.

    With ``fake``, torch's FakeProcessGroup: every collective returns at once on any device, meta
    included; outputs keep their shape and hold no meaning. Otherwise gloo of one rank, which is
    right for groups of one and refuses others. The default group, if any, is not touched.
    """

    def __init__(self, rank: int, *, fake: bool) -> None:
        self.rank = rank
        self.fake = fake

    def make(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Make a communicator, and register it so that torch finds its name and its ranks."""
        at, size = ranks.index(self.rank), len(ranks)
        if not self.fake and size > 1:
            raise ValueError(f"ranks {ranks} cannot talk: only rank {self.rank} exists here")
        store = dist.HashStore()
        group = dist.ProcessGroup(store, at, size)
        if self.fake:
            backend = FakeProcessGroup._create_internal(at, size)
            kind, devices = dist.ProcessGroup.BackendType.CUSTOM, ("cpu", "cuda", "meta")
        else:
            backend = dist.ProcessGroupGloo(store, at, size, timedelta(seconds=60))
            kind, devices = dist.ProcessGroup.BackendType.GLOO, ("cpu", "cuda")
        group._set_default_backend(kind)
        for device in devices:
            group._register_backend(torch.device(device), kind, backend)
        name = f"plait-{'fake' if self.fake else 'single'}-{uuid.uuid4().hex}"
        group._set_group_name(name)  # type: ignore[arg-type]
        _register_process_group(name, group)  # type: ignore[arg-type]
        # point-to-point calls translate ranks through this table
        distributed_c10d._world.pg_group_ranks[group] = {r: i for i, r in enumerate(ranks)}
        return group

    def end(self, group: dist.ProcessGroup) -> None:
        _unregister_process_group(group.group_name)
        distributed_c10d._world.pg_group_ranks.pop(group, None)

    def whole(self) -> dist.ProcessGroup | None:
        return None

    def mesh(
        self,
        groups: list[dist.ProcessGroup],
        ranks: torch.Tensor,
        names: tuple[str, ...],
        device: str,
    ) -> DeviceMesh:
        # from_group asks the default group who we are; the private argument answers instead
        mesh = DeviceMesh(device, ranks, mesh_dim_names=names, _init_backend=False, _rank=self.rank)
        mesh._dim_group_names = [group.group_name for group in groups]
        mesh._pg_registry.update({group.group_name: group for group in groups})
        return mesh
