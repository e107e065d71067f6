"""Run under mpirun by collectives/test_under_mpirun.py (or `make test-mpi-2`): pytest itself is on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from plait.collectives.world import World, init


@pytest.fixture(scope="module")
def world() -> World:
    return init(timeout_s=120)


@pytest.mark.mpi(min_size=2)
def test_the_launcher_is_recognised(world: World) -> None:
    assert world.launcher in ("openmpi", "mpich")
    assert world.size == dist.get_world_size() >= 2


@pytest.mark.mpi(min_size=2)
def test_ranks_sum(world: World) -> None:
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total)
    assert total.item() == world.size * (world.size - 1) / 2


@pytest.mark.mpi(min_size=2)
def test_plait_and_mpi4py_agree_on_the_rank(world: World) -> None:
    mpi = pytest.importorskip("mpi4py.MPI")
    assert mpi.COMM_WORLD.rank == world.rank
    assert mpi.COMM_WORLD.size == world.size
