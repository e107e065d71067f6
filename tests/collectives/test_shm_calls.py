"""What is special to shm: symmetric tensors, mismatched calls, refusals, NaN and rounding."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plait.collectives import Trace, shm
from plait.collectives.errors import PeerMemoryError
from world import current_rank, run_calls, run_world

RANKS = 4


def open_world(folder: str, size: int = RANKS) -> None:
    shm.register()
    shm.register()  # a second time does nothing
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=size)


# ---- symmetric tensors


def reduces_in_place(dtype: torch.dtype, op: Any) -> None:
    rank = dist.get_rank()
    x = shm.symmetric_empty((70, 131), dtype)
    for round in range(3):
        x.fill_(rank + round + 1)
        dist.all_reduce(x, op)
        terms = [r + round + 1 for r in range(RANKS)]
        assert (x == (sum(terms) if op == dist.ReduceOp.SUM else max(terms))).all()
    part = x[10:20]
    x.fill_(rank)
    dist.all_reduce(part, async_op=True).wait()
    assert (part == 6).all()
    assert (x[:10] == rank).all()
    assert (x[20:] == rank).all()
    y = torch.full((5,), 1.0)
    dist.all_reduce(y)  # an ordinary tensor still goes the ordinary way
    assert (y == RANKS).all()


def refuses_different_places() -> str:
    x = shm.symmetric_empty((100,))
    with pytest.raises(shm.CallMismatch) as refusal:
        dist.all_reduce(x[:10] if dist.get_rank() else x[10:20])
    return str(refusal.value)


def test_symmetric_tensors_are_reduced_where_they_lie(tmp_path: Path) -> None:
    cases = [(torch.float32, dist.ReduceOp.SUM), (torch.bfloat16, dist.ReduceOp.SUM)]
    cases.append((torch.int64, dist.ReduceOp.MAX))
    calls = [(open_world, str(tmp_path)), *((reduces_in_place, *case) for case in cases)]
    calls.append((refuses_what_cannot_be_had,))
    answers = run_calls([*calls, (refuses_different_places,)], RANKS, backend=None)
    for found in [answer[-2] for answer in answers]:
        assert "ranks ask for [12, 16, 20, 24] bytes" in found[0]
        assert "rank 0 cannot have" in found[1]
        assert found == answers[0][-2]
    assert all("different calls" in answer[-1] or "given up" in answer[-1] for answer in answers)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refuses_what_cannot_be_had() -> list[str]:
    """The same words on all ranks, and nothing is left open."""
    files, found = open_files(), []
    for shape in ((3 + dist.get_rank(),), (1 << 50,), (1 << 62,)):
        with pytest.raises(PeerMemoryError) as refusal:
            shm.symmetric_empty(shape)
        found.append(str(refusal.value))
    with pytest.raises(ValueError, match="below 0"):
        shm.symmetric_empty((-1, 2))
    assert open_files() == files
    dist.barrier()  # the group still works
    return found


# ---- mistakes


def refusals(folder: str) -> list[str]:
    open_world(folder, 2)
    ones = torch.ones(4)
    calls = [
        lambda: dist.all_reduce(ones, dist.ReduceOp.BAND),
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.int16)),
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.int32), dist.ReduceOp.AVG),
        lambda: dist.all_gather_single(torch.empty(7), ones),
        lambda: dist.all_gather_single(torch.empty(8, dtype=torch.int32), ones),
        lambda: dist.reduce_scatter_single(torch.empty(3), ones),
        lambda: dist.all_to_all_single(torch.empty(4), ones, [1, 1], [2, 2]),
        lambda: dist.all_reduce(torch.ones([4] * 8)[tuple([slice(0, 4, 2)] * 8)]),
        lambda: dist.broadcast(torch.eye(3).to_sparse(), 0),
        lambda: shm.symmetric_empty((3,), group=object()),
    ]
    found = []
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as refusal:
            call()
        found.append(str(refusal.value))
    dist.all_reduce(ones)  # the group still works
    assert (ones == 2).all()
    return found


def test_bad_input_is_refused_and_explained(tmp_path: Path) -> None:
    for found in run_world(refusals, 2, str(tmp_path), backend=None)[:1]:
        expected = [
            "band is for whole numbers",
            "cannot reduce torch.int16",
            "avg is for floating-point",
            "[4] gathered into [7]",
            "float32 with tensors of torch.int32",
            "[4] reduced and scattered into [3]",
            "split sizes [1, 1]",
            "dims that do not merge",
            "sparse_coo (Tensor) has no memory to send",
            "not <object",
        ]
        for text, part in zip(found, expected, strict=True):
            assert part in text


def dead_groups(folder: str) -> str:
    open_world(folder, 2)
    group: Any = dist.new_group([0, 1])
    x = shm.symmetric_empty((3,), group=group).fill_(1.0)
    dist.destroy_process_group(group)
    with pytest.raises(ValueError, match="not initialized"):
        dist.all_reduce(x, group=group)
    with pytest.raises(RuntimeError, match="is closed"):
        group.allreduce([x])
    with pytest.raises(RuntimeError, match="is closed"):
        shm.symmetric_empty((3,), group=group)
    dist.all_reduce(
        x
    )  # its memory lives as long as the tensor, and is memory as any other to other groups
    dist.destroy_process_group()
    return str(x.tolist())


def test_tensors_outlive_the_group_of_their_segment(tmp_path: Path) -> None:
    assert run_world(dead_groups, 2, str(tmp_path), backend=None) == [str([2.0] * 3)] * 2


def numerics(folder: str) -> None:
    open_world(folder)
    rank = dist.get_rank()
    for dtype in (torch.float16, torch.bfloat16):
        # summed in float32, rounded once: 256 + 4 * 0.5 is 258, but 256 for sums rounded after each rank
        x = torch.tensor([256.0 if rank == 0 else 0.75]).to(dtype)
        dist.all_reduce(x)
        assert x.item() == torch.tensor(258.25).to(dtype).item()
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        alone = every.clone() if rank == 0 else torch.full_like(every, -0.0)
        dist.all_reduce(alone)
        kept = torch.where(every.isnan(), 0.0, every)
        assert torch.equal(torch.where(alone.isnan(), 0.0, alone), kept)
        assert torch.equal(alone.isnan(), every.isnan())
    x = torch.tensor([float("nan") if rank == 2 else 1.0, float(rank)])
    dist.all_reduce(x, dist.ReduceOp.MAX)
    assert x[0].isnan()
    assert x[1] == 3


def test_sums_round_once_and_keep_nan(tmp_path: Path) -> None:
    run_world(numerics, RANKS, str(tmp_path), backend=None)


def same_places(folder: str) -> None:
    """Calls whose arguments are looked up by address: other numbers, sizes, dtypes and shapes at the same places."""
    open_world(folder, 2)
    rank = dist.get_rank()
    memory, into = torch.empty(1 << 12, dtype=torch.uint8), torch.empty(1 << 13, dtype=torch.uint8)
    for number, dtype in enumerate((torch.float32, torch.int64, torch.float32)):
        for rows in (2, 6, 2):
            x = memory.view(dtype)[: rows * 5].view(rows, 5).fill_(10 * number + rank)
            out = into.view(dtype)[: 2 * rows * 5].view(2 * rows, 5)
            dist.all_gather_single(out, x)
            expected = torch.tensor([10 * number, 10 * number + 1]).repeat_interleave(rows)
            assert (out == expected[:, None]).all()
            x.add_(torch.arange(rows)[:, None])
            back = out[:rows]
            dist.all_to_all_single(back, x)
            half = torch.arange(rows // 2) + rank * (rows // 2)
            assert (back[:, 0] == torch.cat([half, half + 1]) + 10 * number).all()
            across = memory.view(dtype)[: rows * 4].view(4, rows).t().fill_(rank)  # strided
            dist.all_gather_single(out[:, :4].contiguous().view(2 * rows, 4), across)
    square, out = torch.arange(9.0).view(3, 3), torch.empty(6, 3)
    for x in (square, square.t(), square.t_(), square.t_()):  # one address and shape, other strides
        dist.all_gather_single(out, x)
        assert torch.equal(out, torch.cat([x, x]))
    odd = torch.ones(3, 2)
    with pytest.raises(ValueError, match="3 rows exchanged without split sizes"):
        dist.all_to_all_single(torch.empty(2, 3), odd)


def test_calls_at_the_same_places(tmp_path: Path) -> None:
    run_world(same_places, 2, str(tmp_path), backend=None)


# ---- traces


def traced_calls(folder: str) -> list[tuple[str, str, int, int]]:
    open_world(folder, 2)
    with Trace() as trace:
        dist.all_reduce(torch.ones(6))
        dist.all_gather_single(torch.empty(8), torch.ones(4), async_op=True).wait()
        dist.reduce_scatter_single(torch.empty(3), torch.ones(6))
        dist.all_to_all_single(torch.empty(4), torch.ones(4))
    dist.all_reduce(torch.ones(6))
    return [(e.op, e.axis, e.payload_bytes, e.sent_bytes) for e in trace.events]


def test_a_trace_sees_the_calls(tmp_path: Path) -> None:
    for events in run_world(traced_calls, 2, str(tmp_path), backend=None):
        assert events == [
            ("all_reduce", "group of 2", 24, 24),
            ("all_gather", "group of 2", 16, 16),
            ("reduce_scatter", "group of 2", 24, 12),
            ("all_to_all", "group of 2", 16, 8),
        ]


def waits_in_part(folder: str) -> None:
    open_world(folder, 2)
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(3), async_op=True)
        with pytest.raises(TimeoutError, match="all_reduce of 3 float32"):
            work.wait(timedelta(seconds=0.05))
        dist.send(torch.ones(1), 1)
        work.wait()
    else:
        dist.recv(torch.ones(1), 0)
        dist.all_reduce(torch.ones(3))


def test_waiting_may_be_limited(tmp_path: Path) -> None:
    run_world(waits_in_part, 2, str(tmp_path), backend=None)
