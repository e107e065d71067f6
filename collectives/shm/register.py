"""Make `shm` known to torch.distributed."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from .group import ShmGroup
from .members import Members
from .warm import compile_kernels


def register() -> str:
    """Let `init_process_group("shm")`, `new_group` and device meshes use shared memory; return that name."""
    if "SHM" not in dist.Backend._plugins:
        dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])
    return "shm"


def _create(options: Any, backend_options: object) -> ShmGroup:
    """Open a group.

    Collective: all members; they exchange cards through the store.

    Raises:
        BackendUnavailable: the ranks are not on one host, or not on Linux; the same on all of them.
        PeerLost: a rank did not come.
    """
    names = list(options.global_ranks_in_group) or list(range(options.group_size))
    name = options.group_id or "world"
    rank, timeout = options.group_rank, options.timeout
    members = Members(options.store, rank, names, timeout, name)
    members.open(compile_kernels)  # on rank 0 first: the others find the kernels in Numba's cache
    here = dist.get_world_size() if dist.is_initialized() else options.group_size
    crowded = here > len(os.sched_getaffinity(0))
    return ShmGroup(members, timeout.total_seconds(), spins=20 if crowded else 2000)
