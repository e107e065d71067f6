"""A rank of a world of four ends, stops or leaves, and the others find it lost in a call; over any backend.

The victim is a fork of rank 0's process, so that a test may kill it: the world itself has the other ranks only.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from plait.collectives import PeerLost, gloo, shm
from world import current_rank

RANKS = 4
VICTIM = 3
LARGE = 1_000_000
PATIENCE_S = 4.0  # of groups in which a rank stops; the others are late by less
LONG_S = 150.0  # of groups in which a rank ends: the others must not wait for that
SOON_S = LONG_S / 3  # a busy machine takes seconds for what is at once
REGISTER = {"gloo": gloo.register, "shm": shm.register}


def all_reduce(group: Any) -> None:
    dist.all_reduce(torch.ones(5), group=group)


def large_all_reduce(group: Any) -> None:
    dist.all_reduce(torch.ones(LARGE), group=group)


def asynchronous(group: Any) -> None:
    dist.all_reduce(torch.ones(5), group=group, async_op=True).wait()


def by_future(group: Any) -> None:
    try:
        dist.all_reduce(torch.ones(5), group=group, async_op=True).get_future().wait()
    except RuntimeError as error:  # torch wraps what a future holds
        raise PeerLost(str(error)) from error


def by_thread(group: Any) -> None:
    """Another thread waits than that which called."""
    work = dist.all_reduce(torch.ones(5), group=group, async_op=True)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            work.wait()
        except PeerLost as error:
            raised.append(error.with_traceback(None))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    for error in raised:
        raise PeerLost(str(error))


def scatter(group: Any) -> None:
    dist.scatter(torch.ones(5), None, VICTIM, group=group)


def uneven_exchange(group: Any) -> None:
    parts = [torch.ones(r + dist.get_rank()) for r in range(RANKS)]
    dist.all_to_all([torch.empty_like(x) for x in parts], parts, group=group)


def batched(group: Any) -> None:
    x = torch.ones(5)
    ops = [dist.P2POp(dist.irecv, x, VICTIM, group), dist.P2POp(dist.isend, x, VICTIM, group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def all_gather(group: Any) -> None:
    dist.all_gather([torch.ones(5) for _ in range(RANKS)], torch.ones(5), group=group)


def reduce_scatter(group: Any) -> None:
    dist.reduce_scatter(torch.ones(5), [torch.ones(5) for _ in range(RANKS)], group=group)


def all_to_all(group: Any) -> None:
    ones = [torch.ones(5) for _ in range(RANKS)]
    dist.all_to_all([torch.ones(5) for _ in range(RANKS)], ones, group=group)


def gather_into(group: Any) -> None:
    dist.all_gather_single(torch.empty(RANKS * 5), torch.ones(5), group=group)


def exchange_evenly(group: Any) -> None:
    dist.all_to_all_single(torch.empty(RANKS * 5), torch.ones(RANKS * 5), group=group)


def broadcast(group: Any) -> None:
    dist.broadcast(torch.ones(5), VICTIM, group=group)


def barrier(group: Any) -> None:
    dist.barrier(group=group)


def receive(group: Any) -> None:
    dist.recv(torch.ones(5), VICTIM, group=group)


def large_send(group: Any) -> None:
    dist.send(torch.ones(LARGE), VICTIM, group=group)


def gathered_dtensor(group: Any) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    DTensor.from_local(torch.ones(5), mesh, [Shard(0)], run_check=False).full_tensor().sum().item()


CALLS: dict[Callable[[Any], None], str] = {
    all_reduce: "all_reduce of 5 float32 by sum",
    large_all_reduce: "all_reduce of 1000000 float32",
    asynchronous: "all_reduce of 5 float32",
    by_future: "all_reduce of 5 float32",
    by_thread: "all_reduce of 5 float32",
    scatter: "scatter of ",
    uneven_exchange: "all_to_all of ",
    batched: "receive of 5 float32, tag 0, from rank 3",
    all_gather: "all_gather of 5 float32",
    reduce_scatter: "reduce_scatter of 5 float32",
    all_to_all: "all_to_all of 20 float32",
    broadcast: "broadcast of ",
    barrier: "barrier",
    receive: "receive of 5 float32, tag 0, from rank 3",
    large_send: "send of 1000000 float32, tag 0, to rank 3",
    gather_into: "all_gather of 5 float32",
    exchange_evenly: "all_to_all of 20 float32",
    gathered_dtensor: "all_gather of 5 float32",
}


def with_victim(folder: str, backend: str, end: str, calls: int) -> list[tuple[str, float]]:
    """Rank 0 forks the victim, which ends after one call in a group; say what each later call of the others gave."""
    victim, before = 0, open_files()
    if current_rank() == 0 and (victim := os.fork()) == 0:
        live_and_end(folder, backend, end, calls)
    groups = open_groups(folder, backend, current_rank(), end, calls)
    # no group has a name here: a future's error keeps the frames it went through
    each = list(CALLS)[:calls]
    seen = [lost_in(call, CALLS[call], groups.pop(0), backend) for call in each]
    store = dist.distributed_c10d._get_default_store()
    store.set(f"seen/{current_rank()}", "")
    if victim:
        store.wait([f"seen/{r}" for r in range(RANKS - 1)])
        os.kill(victim, signal.SIGCONT)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    dist.destroy_process_group()
    # torch keeps two groups: a future's error the frames that waited for it, DTensor's caches their meshes
    kept = [call for call in each if call in (by_future, gathered_dtensor)]
    left = left_open(before, most=2 * len(kept))
    assert not left, left
    return seen


def lost_in(call: Callable[[Any], None], what: str, group: Any, backend: str) -> tuple[str, float]:
    """Say what a call in a group that has lost a rank raised, and after how many seconds."""
    begin = time.monotonic()
    with pytest.raises(PeerLost) as lost:
        call(group)
    seconds, said = time.monotonic() - begin, str(lost.value)
    del lost  # whose traceback knows this frame, and so the group
    assert (what if backend == "shm" else what.split()[0]) in said
    depths = [depth_of_error(call, group) for _ in range(3)]  # and again, at once
    assert depths[1] == depths[2], f"an error that is raised again grows: {depths}"
    return said, seconds


def depth_of_error(call: Callable[[Any], None], group: Any) -> int:
    """Count the frames of the traceback that a call in a lost group gives."""
    with pytest.raises((PeerLost, RuntimeError)) as again:
        call(group)
    return len(again.traceback)


def open_files() -> Counter[str]:
    """What this process has open, and the segments it has mapped, by kind."""
    found: Counter[str] = Counter()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            found[str(file.readlink()).split("[")[0].split(":")[0]] += 1
    found["maps"] = shared_maps()
    return found


def shared_maps() -> int:
    """Segments of ours that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:plait")


def left_open(before: Counter[str], most: int, seconds: float = 60) -> dict[str, int]:
    """More than so many of a kind that are open, some time after all groups were destroyed, and were not before."""
    until = time.monotonic() + seconds
    while True:
        gc.collect()
        more = {kind: n for kind, n in (open_files() - before).items() if n > most}
        if not more or time.monotonic() > until:
            return more
        time.sleep(0.1)


def live_and_end(folder: str, backend: str, end: str, calls: int) -> None:
    open_groups(folder, backend, VICTIM, end, calls)
    if end == "leave":
        dist.destroy_process_group()
        time.sleep(600)
    end_here(end)


def end_here(end: str) -> NoReturn:
    """Raise, be killed, or stop, in a process that pytest must not go on in."""
    if end == "raise":
        sys.last_value = ValueError("my own error")
        atexit._run_exitfuncs()
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL if end == "kill" else signal.SIGSTOP)
    os._exit(0)


def open_groups(folder: str, backend: str, rank: int, end: str, count: int) -> list[Any]:
    """Open the world and a group of all ranks for each call, and see that each works."""
    timeout = timedelta(seconds=PATIENCE_S if end == "stop" else LONG_S)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group(REGISTER[backend](), store=store, rank=rank, world_size=RANKS)
    groups = [dist.new_group(list(range(RANKS))) for _ in range(count)]
    for group in groups:
        dist.all_reduce(torch.ones(3), group=group)
        group.set_timeout(timeout)
    dist.barrier()
    return groups
