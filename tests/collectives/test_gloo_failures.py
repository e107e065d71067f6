"""A rank that is lost over gloo: the others get a PeerLost that names it, in bounded time, and nothing is left."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lost_ranks import CALLS, PATIENCE_S, RANKS, SOON_S, with_victim
from plait.collectives import PeerLost, gloo
from plait.collectives.gloo import ledger, members
from world import current_rank, run_world


@pytest.mark.parametrize(("end", "calls"), [("kill", len(CALLS)), ("raise", len(CALLS))])
def test_a_rank_that_ends_is_named_at_once(end: str, calls: int, tmp_path: Path) -> None:
    seen = run_world(with_victim, RANKS - 1, str(tmp_path), "gloo", end, calls, backend=None)
    for message, seconds in (answer for answers in seen for answer in answers):
        assert "rank 3 (process" in message
        assert "has ended with ValueError: my own error" in message or end == "kill"
        assert seconds < SOON_S, message


def test_a_stopped_rank_is_named_in_time(tmp_path: Path) -> None:
    seen = run_world(with_victim, RANKS - 1, str(tmp_path), "gloo", "stop", 2, backend=None)
    for message, seconds in (answer for answers in seen for answer in answers):
        assert "rank 3 (process" in message
        assert "is stopped" in message
        assert seconds < SOON_S, message


def in_different_groups(folder: str, slow_s: float) -> str:
    """Ranks 0 and 1 wait for rank 2 in a group, and it for them in the world; words take so long to write and read."""
    really = members._within
    members._within = lambda *asked: (time.sleep(slow_s), really(*asked))[1]
    store = dist.FileStore(f"{folder}/store", 3)
    name = gloo.register()
    dist.init_process_group(name, store=store, rank=current_rank(), world_size=3)
    all_three = dist.new_group([0, 1, 2], timeout=timedelta(seconds=PATIENCE_S))
    assert isinstance(all_three, gloo.GlooGroup)
    dist.all_reduce(torch.ones(3), group=all_three)
    dist.group.WORLD.set_timeout(timedelta(seconds=PATIENCE_S))  # type: ignore[union-attr]
    dist.barrier()
    calls = {2: lambda: dist.all_gather([torch.ones(2)] * 3, torch.ones(2))}
    with pytest.raises(PeerLost) as lost:
        calls.get(current_rank(), lambda: dist.barrier(group=all_three))()
    with pytest.raises(PeerLost):
        dist.barrier(group=all_three)
    return str(lost.value)


@pytest.mark.parametrize("slow_s", [0.0, 0.4])
def test_ranks_that_wait_for_each_other_see_both_calls(slow_s: float, tmp_path: Path) -> None:
    said = run_world(in_different_groups, 3, str(tmp_path), slow_s, backend=None)
    assert "barrier in group" in said[0]
    assert any("rank 2" in text and "all_gather of 2 float32 in group 0" in text for text in said)
    assert "all_gather of 2 float32 in group 0 did not end" in said[2]
    assert "barrier in group" in said[2]


def comes_late(folder: str) -> str:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(gloo.register(), store=store, rank=current_rank(), world_size=2)
    dist.barrier()
    dist.group.WORLD.set_timeout(timedelta(seconds=1))  # type: ignore[union-attr]
    if current_rank():
        store.wait(["given up"])
    with pytest.raises(PeerLost) as lost:
        dist.all_reduce(torch.ones(3), async_op=True).wait()
    store.set("given up", "")
    return str(lost.value)


def test_a_rank_that_comes_too_late_is_told(tmp_path: Path) -> None:
    waited, late = run_world(comes_late, 2, str(tmp_path), backend=None)
    assert "rank 1" in waited
    assert "has not come" in waited
    assert "rank 0" in late
    assert "has given up" in late


def stops_for_long(folder: str) -> str:
    """The group would wait for five minutes; a process that is stopped is given up before."""
    store = dist.FileStore(f"{folder}/store", 2)
    ledger.STOPPED_S = 1.0
    if child := os.fork():
        dist.init_process_group(gloo.register(), store=store, rank=0, world_size=2)
        future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
        with pytest.raises(RuntimeError) as lost:  # torch wraps what a future holds
            future.wait()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return str(lost.value)
    dist.init_process_group(gloo.register(), store=store, rank=1, world_size=2)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)


def test_a_stopped_rank_is_given_up_before_a_long_timeout(tmp_path: Path) -> None:
    (said,) = run_world(stops_for_long, 1, str(tmp_path), backend=None)
    assert "all_reduce of 3 float32" in said
    assert "rank 1 (process" in said
    assert "is stopped" in said


def drops_and_leaves(folder: str, flush_s: float) -> str:
    """Rank 0 sends and leaves at once; rank 1 receives a little later."""
    ledger.FLUSH_S = flush_s
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(gloo.register(), store=store, rank=current_rank(), world_size=2)
    dist.barrier()  # or the first would leave while the second opens
    x = torch.full((100_000,), 1.0 + current_rank())
    if current_rank() == 0:
        dist.isend(x, 1)
        store.set("sent", "")
        dist.destroy_process_group()
        store.set("left", "")
        return ""
    store.wait(["sent" if flush_s else "left"])
    time.sleep(0.3)  # it waits for this rank by now
    try:
        dist.recv(x, 0)
    except PeerLost as error:
        return str(error)
    return f"{x.sum():g}"


@pytest.mark.parametrize("flush_s", [30.0, 0.0])
def test_a_send_that_nobody_waits_for_arrives_before_its_group_closes(
    flush_s: float, tmp_path: Path
) -> None:
    _, said = run_world(drops_and_leaves, 2, str(tmp_path), flush_s, backend=None)
    if flush_s:
        assert said == "100000"
    else:  # the negative control
        assert "receive of 100000 float32 from rank 0" in said
