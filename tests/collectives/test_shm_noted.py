"""Calls that are looked up by where their tensors lie: others at the same places are other calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mutated import mutated
from plait.collectives import shm
from plait.collectives.shm import noted
from world import current_rank, run_calls, run_world

ADD, MOST, MEAN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG
CASES = [
    (torch.float32, ADD, 6), (torch.float32, MOST, 6), (torch.float32, MEAN, 6), (torch.int32, ADD, 6),
    (torch.int32, MOST, 12), (torch.bfloat16, ADD, 6), (torch.complex64, ADD, 4), (torch.float32, ADD, 40),
    (torch.float32, ADD, 0), (torch.float32, ADD, 6),
]  # fmt: skip


def open_world(folder: str, size: int = 2) -> None:
    shm.register()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=size)


def brought(rows: int, dtype: torch.dtype, rank: int) -> Tensor:
    return ((torch.arange(rows * 3).view(rows, 3) * (rank + 2)) % 11 - 3).to(dtype)


def reduced(parts: list[Tensor], op: Any) -> Tensor:
    wide = torch.complex128 if parts[0].is_complex() else torch.float64
    every = torch.stack([part.to(wide) for part in parts])
    found = every.real.amax(0) if op == MOST else every.sum(0)
    return (found / len(parts) if op == MEAN else found).to(parts[0].dtype)


def at(memory: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    return memory[: rows * 3 * dtype.itemsize].view(dtype).view(rows, 3)


def all_right(memory: Tensor, into: Tensor) -> bool:
    """Reduce other numbers, dtypes and shapes by other operators, all at two places."""
    rank, right = dist.get_rank(), True
    for dtype, op, rows in CASES:
        parts = [brought(rows, dtype, r) for r in range(2)]
        x = at(memory, dtype, rows).copy_(parts[rank])
        out = at(into, dtype, rows // 2).zero_()
        dist.reduce_scatter_single(out, x, op)
        half = slice(rank * rows // 2, (rank + 1) * rows // 2)
        right &= torch.equal(out, reduced(parts, op)[half])
        right &= torch.equal(x, parts[rank])
        dist.all_reduce(x, op)
        right &= torch.equal(x, reduced(parts, op))
    return right


def all_right_strided(memory: Tensor, into: Tensor) -> bool:
    """Reduce tensors of one place, shape and dtype whose strides differ from call to call, and between the ranks."""
    rank, right = dist.get_rank(), True
    square, half = memory[:64].view(torch.float32).view(4, 4), into[:32].view(torch.float32)
    wide = into[:64].view(torch.float32).view(4, 4)
    for turn in range(4):
        x = square.t() if (turn + rank) % 2 else square
        for out in (half.view(2, 4), wide[:2], wide[:, :2].t(), half.view(2, 4)):
            terms = [torch.arange(16.0).view(4, 4) * (r + 1) for r in range(2)]
            x.copy_(terms[rank])
            dist.reduce_scatter_single(out, x)
            right &= torch.equal(out, sum(terms)[2 * rank : 2 * rank + 2])
        dist.all_reduce(x)
        right &= torch.equal(x, sum(terms))
    return right


def two_places() -> list[Tensor]:
    return [torch.zeros(512, dtype=torch.uint8) for _ in range(2)]


def exact(folder: str) -> None:
    open_world(folder)
    for check in (all_right, all_right_strided):
        places = two_places()
        assert check(*places)
        assert check(*places), "and when they come again"


def test_other_calls_at_the_same_places(tmp_path: Path) -> None:
    run_world(exact, 2, str(tmp_path), backend=None)


def with_less(check: Callable[..., bool], old: str, new: str) -> bool:
    """The same, by a look-up that leaves something out."""
    group: Any = dist.group.WORLD
    true, group._noted = group._noted, mutated(noted, old, new).Noted(group.engine)
    try:
        return check(*two_places())
    finally:
        group._noted = true
        group.engine.noted.clear()


MUTANTS = [
    (all_right, "hash(op), place, x.shape", "hash(op), place, 0"),
    (all_right, "x.shape, x.dtype", "x.shape, 0"),
    (all_right, "hash(op), place,", "0, place,"),
    (all_right, "hash(op), places,", "0, places,"),
    (all_right, "output.shape, input.shape, output.dtype", "0, 0, output.dtype"),
    (all_right, "output.dtype, input.dtype\n", "0, 0\n"),
    (all_right_strided, "or not x.is_contiguous()", ""),
    (all_right_strided, "not (output.is_contiguous() and input.is_contiguous())", "False"),
    (all_right_strided, "(output.is_contiguous() and input.", "(input."),
    (all_right_strided, "and input.is_contiguous())", ")"),
]


def test_each_part_of_the_look_up_is_needed(tmp_path: Path) -> None:
    calls = [(open_world, str(tmp_path)), *((with_less, *mutant) for mutant in MUTANTS)]
    for answers in run_calls([*calls, (with_less, all_right, "MOST", "MOST")], 2, backend=None):
        assert answers[-1], "nothing was left out"
        for mutant, right in zip(MUTANTS, answers[1:-1], strict=True):
            assert not right, f"nobody misses {mutant[1]!r}"


def refusals(folder: str) -> None:
    open_world(folder)
    x, out = torch.ones(8), torch.empty(4)
    dist.all_reduce(x)
    dist.reduce_scatter_single(out, x)
    group: Any = dist.group.WORLD
    number, pairs = torch.ones(1, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)
    group.all_gather_single(pairs, number)
    for call, said in (
        (lambda: dist.all_reduce(x, dist.ReduceOp.BAND), "band is for whole numbers"),
        (lambda: dist.all_reduce(x.view(torch.int16)), "cannot reduce torch.int16"),
        (lambda: dist.reduce_scatter_single(out, x, dist.ReduceOp.BXOR), "bxor is for whole"),
        (lambda: dist.reduce_scatter_single(out.view(torch.int32), x), "use one dtype"),
        (lambda: dist.all_reduce(torch._neg_view(x)), r"is_neg\(\) is"),
        (lambda: dist.reduce_scatter_single(out, torch._neg_view(x)), r"is_neg\(\) is"),
        (lambda: dist.reduce_scatter_single(torch._neg_view(out), x), r"is_neg\(\) is"),
        (lambda: group.all_gather_single(pairs, number.conj()), r"is_conj\(\) is"),
        (lambda: dist.reduce_scatter_single(out[:3], x), r"\[8\] reduced and scattered into"),
        (lambda: dist.reduce_scatter_single(out, x[:6]), r"\[6\] reduced and scattered into"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=said):
                call()
    x.fill_(1)
    dist.all_reduce(x)  # the group still works
    assert (x == 2).all()


def test_what_does_not_suit_is_refused_at_known_places(tmp_path: Path) -> None:
    run_world(refusals, 2, str(tmp_path), backend=None)


def symmetric_memory_comes_later(folder: str) -> int:
    open_world(folder)
    group: Any = dist.group.WORLD
    x = torch.ones(8)
    dist.all_reduce(x)
    known = len(group.engine.noted)
    assert known > 0
    shared = shm.symmetric_empty((8,)).fill_(1.0)
    assert all(place != x.data_ptr() for _, place, *_ in group.engine.noted)
    for _ in range(2):
        shared.fill_(1.0)
        dist.all_reduce(shared)
        assert (shared == 2).all()
    return known


def test_symmetric_memory_makes_a_group_forget(tmp_path: Path) -> None:
    """It may lie where another tensor lay, and is reduced by another kernel."""
    run_world(symmetric_memory_comes_later, 2, str(tmp_path), backend=None)


def forgets(folder: str) -> None:
    open_world(folder)
    group: Any = dist.group.WORLD
    memory = torch.zeros(noted.MOST + 10)
    for n in range(noted.MOST + 10):
        dist.all_reduce(memory[n : n + 1])
    assert 0 < len(group.engine.noted) <= noted.MOST
    memory.fill_(1)
    dist.all_reduce(memory[5:9])
    assert memory[:12].tolist() == [1] * 5 + [2] * 4 + [1] * 3


def test_a_group_remembers_no_more_than_it_may(tmp_path: Path) -> None:
    run_world(forgets, 2, str(tmp_path), backend=None)


def late_and_asynchronous(folder: str) -> None:
    """A call whose partner is late becomes pending work; calls behind it keep the order."""
    open_world(folder)
    rank = dist.get_rank()
    x, parts, out = torch.ones(4), torch.arange(4.0), torch.empty(2)
    for turn in range(3):
        x.fill_(1 + rank)
        if rank == turn % 2:
            time.sleep(0.05)
        work = dist.all_reduce(x, async_op=bool(turn))
        dist.reduce_scatter_single(out, parts)
        if work is not None:
            work.wait()
        assert (x == 3).all()
        assert torch.equal(out, 2 * parts[2 * rank : 2 * rank + 2])


def test_calls_that_must_wait(tmp_path: Path) -> None:
    run_world(late_and_asynchronous, 2, str(tmp_path), backend=None)
