"""What a trace says was sent, against a count by hand: every call, on every backend, also from inside DTensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from plait.collectives import Trace, gloo, shm
from world import current_rank, run_world

N, ROOT, FLOAT = 3, 1, 4
Calls = dict[
    str, tuple[str, Callable[[], Any], int]
]  # the trace's name, the call, bytes this rank sends


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def calls(me: int, asynchronous: bool) -> Calls:
    g: Any = dist.group.WORLD
    k = {"group": g, "async_op": asynchronous}
    behind = (me - ROOT) % N  # the root's neighbours, in a ring
    parts = [zeros(6) for _ in range(N)]
    runs = [3 * (r + me) for r in range(N)]
    uneven = FLOAT * (sum(runs) - runs[me])
    return {
        "all_reduce": ("all_reduce", lambda: dist.all_reduce(zeros(6, 4), **k), 2 * 96 * 2 // 3),
        "reduce": ("reduce", lambda: dist.reduce(zeros(6, 4), ROOT, **k), 96 * (behind != 0)),
        "broadcast": ("broadcast", lambda: dist.broadcast(zeros(6, 4), ROOT, **k), 96 * (behind != 2)),
        "all_gather": ("all_gather", lambda: dist.all_gather(parts, zeros(6), **k), 24 * 2),
        "in one": ("all_gather", lambda: dist.all_gather_into_tensor(zeros(18), zeros(6), **k), 24 * 2),
        "reduce_scatter": ("reduce_scatter", lambda: dist.reduce_scatter(zeros(6), parts, **k), 24 * 2),
        "of one": ("reduce_scatter", lambda: dist.reduce_scatter_tensor(zeros(6), zeros(18), **k), 24 * 2),
        "lists": ("all_to_all", lambda: dist.all_to_all([zeros(6) for _ in parts], parts, **k), 24 * 2),
        "exchange": ("all_to_all", lambda: dist.all_to_all_single(zeros(6), zeros(6), **k), 8 * 2),
        "uneven": (
            "all_to_all", lambda: dist.all_to_all_single(zeros(sum(runs)), zeros(sum(runs)), runs, runs, **k), uneven
        ),
        "gather": (
            "gather", lambda: dist.gather(zeros(6), parts if me == ROOT else None, ROOT, **k), 24 * (me != ROOT)
        ),
        "scatter": (
            "scatter", lambda: dist.scatter(zeros(6), parts if me == ROOT else None, ROOT, **k), 48 * (me == ROOT)
        ),
        "barrier": ("barrier", lambda: dist.barrier(**k), 0),
        "functional": ("all_reduce", lambda: functional.all_reduce(zeros(6, 4), "sum", g).sum(), 128),
        "of a result": (
            "all_gather", lambda: functional.all_gather_tensor(zeros(6), 0, g).sum(), 24 * 2
        ),
        "back": ("reduce_scatter", lambda: functional.reduce_scatter_tensor(zeros(18), "sum", 0, g).sum(), 24 * 2),
    }  # fmt: skip


def messages(me: int) -> None:
    ring = [
        dist.P2POp(dist.isend, torch.zeros(7), (me + 1) % N),
        dist.P2POp(dist.irecv, torch.zeros(7), (me - 1) % N),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()


def counted(backend: str, folder: str) -> list[str]:
    name = {"torch": lambda: "gloo", "gloo": gloo.register, "shm": shm.register}[backend]()
    store = dist.FileStore(f"{folder}/store", N)
    dist.init_process_group(name, store=store, rank=current_rank(), world_size=N)
    me, wrong = dist.get_rank(), []
    for asynchronous in (False, True):
        for what, (op, call, expected) in calls(me, asynchronous).items():
            with Trace() as trace:
                work = call()
                if hasattr(work, "wait"):
                    work.wait()
            seen = [(e.op, e.sent_bytes) for e in trace.events]
            if seen != [(op, expected)]:
                wrong.append(f"{what}: {seen}, not {(op, expected)}")
            wrong += [f"{what}: no seconds" for e in trace.events if e.seconds <= 0]
    with Trace() as trace:
        messages(me)
    if {(e.op, e.sent_bytes) for e in trace.events} != {("send", 28), ("recv", 0)}:
        wrong.append(f"messages: {trace.events}")
    mesh = init_device_mesh("cpu", (N,))
    cut = DTensor.from_local(torch.ones(6, 2), mesh, [Shard(0)])
    with Trace() as trace:
        assert cut.redistribute(placements=[Replicate()]).to_local().sum() == 36
    if [(e.op, e.sent_bytes) for e in trace.events] != [("all_gather", 48 * 2)]:
        wrong.append(f"DTensor: {trace.events}")
    with Trace() as trace:
        more = cut.sum() + 1  # by itself it adds the partial sums first
    if more.item() != 37 or [(e.op, e.sent_bytes) for e in trace.events] != [("all_reduce", 5)]:
        wrong.append(f"a DTensor by itself: {trace.events}")
    for op, call, sizes, expected in (
        ("all_reduce", dist.all_reduce, (6,), 2 * 24 * 2 // 3),
        ("all_gather", dist.all_gather_into_tensor, (18, 6), 24 * 2),
        ("reduce_scatter", dist.reduce_scatter_tensor, (6, 18), 24 * 2),
    ):
        with Trace() as trace, dist._coalescing_manager():
            for _ in range(2):
                call(*map(zeros, sizes))
        if {e.op for e in trace.events} != {op} or trace.sent_bytes() != 2 * expected:
            wrong.append(f"two of {op} as one: {trace.events}")
    return wrong


def events_taken_before_the_end() -> list[str]:
    shm.register()
    group = dist.new_group(backend="shm")
    with Trace() as trace:
        work = dist.barrier(group, async_op=True)
        trace.events.clear()
        dist.all_reduce(zeros(2), group=group, async_op=True).wait()
        assert work is not None
        work.wait()
    return [e.op for e in trace.events]


def test_events_may_be_taken_before_their_calls_end() -> None:
    assert run_world(events_taken_before_the_end, 2) == [["all_reduce"]] * 2


@pytest.mark.parametrize("backend", ["torch", "gloo", "shm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bytes_are_those_counted_by_hand(backend: str, tmp_path: Any) -> None:
    for wrong in run_world(counted, N, backend, str(tmp_path), backend=None):
        assert wrong == []


def waits_long(backend: str, folder: str) -> tuple[float, float]:
    """Rank 1 receives, and rank 0 sends later; say when each began and ended, by one clock."""
    name = {"gloo": gloo.register, "shm": shm.register}[backend]()
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(name, store=store, rank=current_rank(), world_size=2)
    dist.barrier()
    with Trace() as trace:
        if current_rank() == 0:
            store.wait(["receives"])
            time.sleep(0.2)
            dist.send(torch.zeros(7), 1)
        else:
            store.set("receives", "")
            dist.recv(torch.zeros(7), 0)
    (event,) = trace.events
    return event.start, event.end


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_a_message_is_timed_until_it_came(backend: str, tmp_path: Any) -> None:
    (sent, _), (_, received) = run_world(waits_long, 2, backend, str(tmp_path), backend=None)
    assert received >= sent
