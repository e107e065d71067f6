"""A rank that ends, stops or leaves: the others get a PeerLost that names it, in bounded time, and nothing is left."""

from __future__ import annotations

import gc
import os
import resource
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lost_ranks import CALLS, PATIENCE_S, RANKS, SOON_S, shared_maps, with_victim
from plait.collectives import BackendUnavailable, PeerLost, processes, shm
from plait.collectives.shm import members
from world import current_rank, run_world


@pytest.mark.parametrize(
    ("end", "calls"), [("kill", len(CALLS)), ("raise", len(CALLS)), ("leave", len(CALLS))]
)
def test_a_rank_that_ends_is_named_at_once(end: str, calls: int, tmp_path: Path) -> None:
    seen = run_world(with_victim, RANKS - 1, str(tmp_path), "shm", end, calls, backend=None)
    for message, seconds in (answer for answers in seen for answer in answers):
        assert "rank 3" in message
        assert (
            "has closed" if end == "leave" else "has ended"
        ) in message or "lost rank 3" in message
        assert seconds < SOON_S, message


def test_a_stopped_rank_is_named_in_time(tmp_path: Path) -> None:
    seen = run_world(with_victim, RANKS - 1, str(tmp_path), "shm", "stop", 2, backend=None)
    for message, seconds in (answer for answers in seen for answer in answers):
        assert f"is stopped within {PATIENCE_S:g} s" in message or "lost rank 3" in message
        assert seconds < SOON_S, message
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
    processes.host = lambda: f"host {current_rank()}"
    store = dist.FileStore(f"{folder}/store", 2)
    with pytest.raises(BackendUnavailable) as refusal:
        dist.init_process_group("shm", store=store, rank=current_rank(), world_size=2)
    return str(refusal.value)


def test_ranks_of_two_hosts_are_refused_alike(tmp_path: Path) -> None:
    first, second = run_world(on_two_hosts, 2, str(tmp_path), backend=None)
    assert first == second
    assert "one host" in first
    assert "use backend 'gloo'" in first


def refusal_of_three(folder: str) -> str:
    store = dist.FileStore(f"{folder}/store", 3)
    with pytest.raises(BackendUnavailable) as refusal:
        dist.init_process_group("shm", store=store, rank=current_rank(), world_size=3)
    return str(refusal.value)


def where_one_cannot_map(folder: str) -> str:
    shm.register()
    if current_rank() == 1:
        really = members.Segment.open
        members.Segment.open = lambda *_: really(os.getpid(), 10**6, 0)  # no such file
    return refusal_of_three(folder)


def test_where_one_rank_cannot_map_all_are_told(tmp_path: Path) -> None:
    answers = run_world(where_one_cannot_map, 3, str(tmp_path), backend=None)
    assert len(set(answers)) == 1
    assert "cannot open the memory of process" in answers[0]


def where_one_cannot_watch(folder: str) -> str:
    def refused(pid: int) -> int:
        raise OSError(24, "Too many open files")

    shm.register()
    if current_rank() == 1:
        os.pidfd_open = refused
    return refusal_of_three(folder)


def test_where_one_rank_cannot_watch_all_are_told(tmp_path: Path) -> None:
    answers = run_world(where_one_cannot_watch, 3, str(tmp_path), backend=None)
    assert len(set(answers)) == 1
    assert "rank 1 cannot watch other processes" in answers[0]
    assert "use backend 'gloo'" in answers[0]


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


def test_nothing_is_left(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    for counts in run_world(opens_and_closes, 2, str(tmp_path), backend=None):
        assert counts[:-1] == [2, 0, 2, 0, 2, 0]
        assert counts[-1] < 40
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if "plait" in path.name]


def where_one_rank_has_no_room(poor: int) -> tuple[str, float]:
    """A group over shm where one rank's address space has no room for it; then one over gloo."""
    shm.register()
    dist.new_group(backend="shm")  # kernels are loaded
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    if dist.get_rank() == poor:
        limit = pages * resource.getpagesize() + (6 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    with pytest.raises(BackendUnavailable) as refusal:
        dist.new_group(backend="shm")
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    x = torch.ones(2)
    dist.all_reduce(x, group=dist.new_group())
    return str(refusal.value), x[0].item()


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY,
    reason="has a limit already",
)
@pytest.mark.parametrize("poor", [0, 1])
def test_a_segment_that_one_rank_cannot_have_is_refused_on_all(poor: int) -> None:
    results = run_world(where_one_rank_has_no_room, 3, poor)
    assert len(set(results)) == 1
    error, total = results[0]
    assert f"rank {poor} cannot {'map' if poor else 'have'} " in error
    assert "use backend 'gloo'" in error
    assert total == 3.0
