"""A rank that is lost while others train: DDP and FSDP2 end with words that name it, and other groups go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lost_ranks import LONG_S, PATIENCE_S, REGISTER, SOON_S, end_here
from plait.collectives import PeerLost
from plait.collectives.work import Promise
from world import current_rank, run_world

RANKS, VICTIM = 3, 2
ENDED = {
    "kill": "has ended",
    "raise": "has ended",
    "stop": "is stopped",
}


def ddp() -> nn.Module:
    return DistributedDataParallel(model(), bucket_cap_mb=0.001)


def hooked() -> nn.Module:
    """DDP with a communication hook, whose callback reads the future's value."""
    parallel = DistributedDataParallel(model())
    parallel.register_comm_hook(dist.group.WORLD, allreduce_hook)
    return parallel


def fsdp2() -> nn.Module:
    sharded, mesh = model(), init_device_mesh("cpu", (RANKS,))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    return fully_shard(sharded, mesh=mesh)


WRAPS: dict[str, Callable[[], nn.Module]] = {"ddp": ddp, "hooked": hooked, "fsdp2": fsdp2}


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)])


def step(trained: nn.Module) -> None:
    trained(torch.ones(2, 12)).sum().backward()


def opened(folder: str, backend: str, rank: int, wrap: str, end: str) -> tuple[nn.Module, Any]:
    """Open the world and a group without the victim, and see that training works."""
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group(REGISTER[backend](), store=store, rank=rank, world_size=RANKS)
    survivors = dist.new_group([0, 1])
    trained = WRAPS[wrap]()
    for _ in range(2):  # DDP makes its buckets anew in the second
        step(trained)
    patience = timedelta(seconds=PATIENCE_S if end == "stop" else LONG_S)
    dist.group.WORLD.set_timeout(patience)  # type: ignore[union-attr]
    dist.barrier()
    return trained, survivors


def live_and_end(folder: str, backend: str, wrap: str, end: str) -> None:
    opened(folder, backend, VICTIM, wrap, end)
    end_here(end)


def trains(folder: str, backend: str, wrap: str, end: str) -> list[str]:
    """Rank 0 forks the victim; say what training ends with, there and later."""
    victim = 0
    if current_rank() == 0 and (victim := os.fork()) == 0:
        live_and_end(folder, backend, wrap, end)
    trained, survivors = opened(folder, backend, current_rank(), wrap, end)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as lost:  # torch's C++ makes it of a PeerLost
        step(trained)
    assert time.monotonic() - begin < SOON_S
    with pytest.raises(PeerLost) as again:
        dist.barrier()
    x = torch.ones(4)
    dist.all_reduce(x, group=survivors)
    assert x.tolist() == [2.0] * 4
    if victim:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    return [str(lost.value), str(again.value)]


@pytest.mark.parametrize("end", ["kill", "stop", "raise"])
@pytest.mark.parametrize("wrap", list(WRAPS))
@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_training_names_the_lost_rank(backend: str, wrap: str, end: str, tmp_path: Path) -> None:
    seen = run_world(trains, 2, str(tmp_path), backend, wrap, end, backend=None)
    call = "all_gather of" if wrap == "fsdp2" else "all_reduce of"
    for said in seen:
        assert call in said[0]
        for words in said:
            assert "rank 2" in words
    assert any(ENDED[end] in words for said in seen for words in said)


def test_a_promise_fails_for_whoever_reads_it() -> None:
    promise = Promise()
    read = promise.future.then(lambda done: done.value())
    promise.settle(PeerLost("rank 3 has ended"))
    for future in (promise.future, read):
        with pytest.raises(RuntimeError, match="PeerLost: rank 3 has ended"):
            future.wait()
