"""A rank that ends, stops or leaves: the others get a PeerLost that names it, in bounded time, and nothing is left."""

from __future__ import annotations

import gc
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

from plait.collectives import BackendUnavailable, PeerLost, shm
from plait.collectives.shm import members
from world import current_rank, run_world

RANKS = 4
VICTIM = 3
LARGE = 1_000_000
PATIENCE_S = 2.0


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


def all_gather(group: Any) -> None:
    dist.all_gather([torch.ones(5) for _ in range(RANKS)], torch.ones(5), group=group)


def reduce_scatter(group: Any) -> None:
    dist.reduce_scatter(torch.ones(5), [torch.ones(5) for _ in range(RANKS)], group=group)


def all_to_all(group: Any) -> None:
    ones = [torch.ones(5) for _ in range(RANKS)]
    dist.all_to_all([torch.ones(5) for _ in range(RANKS)], ones, group=group)


def broadcast(group: Any) -> None:
    dist.broadcast(torch.ones(5), VICTIM, group=group)


def barrier(group: Any) -> None:
    dist.barrier(group=group)


def receive(group: Any) -> None:
    dist.recv(torch.ones(5), VICTIM, group=group)


def large_send(group: Any) -> None:
    dist.send(torch.ones(LARGE), VICTIM, group=group)


CALLS: dict[Callable[[Any], None], str] = {
    all_reduce: "all_reduce of 5 float32 by sum",
    large_all_reduce: "all_reduce of 1000000 float32",
    asynchronous: "all_reduce of 5 float32",
    by_future: "all_reduce of 5 float32",
    all_gather: "all_gather of 5 float32",
    reduce_scatter: "reduce_scatter of 5 float32",
    all_to_all: "all_to_all of 20 float32",
    broadcast: "broadcast of ",
    barrier: "barrier",
    receive: "receive of 5 float32, tag 0, from rank 3",
    large_send: "send of 1000000 float32, tag 0, to rank 3",
}


def with_victim(folder: str, end: str, calls: int) -> list[tuple[str, float]]:
    """Rank 0 forks the victim, which ends after one call in a group; say what each later call of the others gave."""
    victim = 0
    if current_rank() == 0 and (victim := os.fork()) == 0:
        live_and_end(folder, end, calls)
    groups = open_groups(folder, current_rank(), calls)
    chosen = list(zip(CALLS.items(), groups, strict=False))
    seen = []
    for (call, what), group in chosen:
        begin = time.monotonic()
        with pytest.raises(PeerLost) as lost:
            call(group)
        seen.append((str(lost.value), time.monotonic() - begin))
        assert what in str(lost.value)
        with pytest.raises((PeerLost, RuntimeError)):
            call(group)  # and again, at once
    store = dist.distributed_c10d._get_default_store()
    store.set(f"seen/{current_rank()}", "")
    if victim:
        store.wait([f"seen/{r}" for r in range(RANKS - 1)])
        os.kill(victim, signal.SIGCONT)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    dist.destroy_process_group()
    return seen


def live_and_end(folder: str, end: str, calls: int) -> None:
    open_groups(folder, VICTIM, calls)
    if end == "leave":
        dist.destroy_process_group()
        time.sleep(60)
    if end == "raise":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL if end == "kill" else signal.SIGSTOP)
    os._exit(0)


def open_groups(folder: str, rank: int, count: int) -> list[Any]:
    """Open the world and a group of all ranks for each call, and see that each works."""
    shm.register()
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("shm", store=store, rank=rank, world_size=RANKS)
    groups = [dist.new_group(list(range(RANKS))) for _ in range(count)]
    for group in groups:
        dist.all_reduce(torch.ones(3), group=group)
        group.set_timeout(timedelta(seconds=PATIENCE_S))
    dist.barrier()
    return groups


@pytest.mark.parametrize(("end", "calls"), [("kill", len(CALLS)), ("raise", 1), ("leave", 2)])
def test_a_rank_that_ends_is_named_at_once(end: str, calls: int, tmp_path: Path) -> None:
    seen = run_world(with_victim, RANKS - 1, str(tmp_path), end, calls, backend=None)
    for message, seconds in (answer for answers in seen for answer in answers):
        assert "rank 3" in message
        assert (
            "has closed" if end == "leave" else "has ended"
        ) in message or "lost rank 3" in message
        assert seconds < PATIENCE_S, message


def test_a_stopped_rank_is_named_in_time(tmp_path: Path) -> None:
    seen = run_world(with_victim, RANKS - 1, str(tmp_path), "stop", 2, backend=None)
    for message, seconds in (answer for answers in seen for answer in answers):
        assert "is stopped within 2 s" in message or "lost rank 3" in message
        assert seconds < 3 * PATIENCE_S, message
    assert any("rank 3 (process" in message for answers in seen for message, _ in answers)


def opens_too_early(folder: str) -> str:
    shm.register()
    store = dist.FileStore(f"{folder}/store", 2)
    with pytest.raises(PeerLost) as lost:
        dist.init_process_group(
            "shm", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.5)
        )
    return str(lost.value)


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    (message,) = run_world(opens_too_early, 1, str(tmp_path), backend=None)
    assert "ranks [1] did not come within 0.5 s" in message


def on_two_hosts(folder: str) -> str:
    shm.register()
    members._host = lambda: f"host {current_rank()}"
    store = dist.FileStore(f"{folder}/store", 2)
    with pytest.raises(BackendUnavailable) as refusal:
        dist.init_process_group("shm", store=store, rank=current_rank(), world_size=2)
    return str(refusal.value)


def test_ranks_of_two_hosts_are_refused_alike(tmp_path: Path) -> None:
    first, second = run_world(on_two_hosts, 2, str(tmp_path), backend=None)
    assert first == second
    assert "one host" in first
    assert "use backend 'gloo'" in first


def where_one_cannot_map(folder: str) -> str:
    shm.register()
    if current_rank() == 1:
        really = members.Segment.open
        members.Segment.open = lambda *_: really(os.getpid(), 10**6, 0)  # no such file
    store = dist.FileStore(f"{folder}/store", 3)
    with pytest.raises(BackendUnavailable) as refusal:
        dist.init_process_group("shm", store=store, rank=current_rank(), world_size=3)
    return str(refusal.value)


def test_where_one_rank_cannot_map_all_are_told(tmp_path: Path) -> None:
    answers = run_world(where_one_cannot_map, 3, str(tmp_path), backend=None)
    assert len(set(answers)) == 1
    assert "cannot open the memory of process" in answers[0]


def opens_and_closes(folder: str) -> list[int]:
    shm.register()
    counts = []
    for visit in range(3):
        store = dist.FileStore(f"{folder}/store{visit}", 2)
        dist.init_process_group("shm", store=store, rank=current_rank(), world_size=2)
        dist.all_reduce(torch.ones(3), group=dist.new_group([0, 1]))
        opened = shared_maps()
        dist.destroy_process_group()
        gc.collect()
        counts += [opened, shared_maps()]
    return [*counts, len(list(Path("/proc/self/fd").iterdir()))]


def shared_maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:plait")


def test_nothing_is_left(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    for counts in run_world(opens_and_closes, 2, str(tmp_path), backend=None):
        assert counts[:-1] == [2, 0, 2, 0, 2, 0]
        assert counts[-1] < 40
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if "plait" in path.name]
