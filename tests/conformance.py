"""What every c10d backend must do: one body, run over gloo, shm and mpi by collectives/test_conformance.py.

A check is a function of `Abilities`, called by every rank of a world of four whose default group runs the
backend under test. What a collective must give is computed from all ranks' inputs by each rank alone;
the inputs are small whole numbers, so that every dtype and every order of summing gives the same bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from threads import appears

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
NUMBERS = (*FLOATS, *INTEGERS)
MOVED = (*NUMBERS, torch.bool, torch.complex64)
BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


@dataclass(frozen=True)
class Abilities:
    """What this backend does beyond what all must do."""

    strided: bool = True  # outputs and inputs of any strides
    any_source: bool = True  # recv(src=None)
    itself: bool = True  # isend to the own rank


GLOO = Abilities(strided=False, itself=False)
Check = Callable[[Abilities], None]


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def numbers(of: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The tensor that rank `of` brings; every rank can make it."""
    source = torch.Generator().manual_seed(1000 * seed + of)
    low = 0 if dtype in (torch.uint8, torch.bool) else -3
    high = 2 if dtype == torch.bool else 4
    return torch.randint(low, high, shape, generator=source).to(dtype)


def transposed(x: Tensor) -> Tensor:
    """The same values, laid out in memory with the dims reversed."""
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


def sparse(x: Tensor) -> Tensor:
    """The same values with holes between them, in the middle of a larger tensor of sevens."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), 7).to(x.dtype)
    view = wide[..., 2 : 2 + 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view


def layouts(can: Abilities) -> tuple[Callable[[Tensor], Tensor], ...]:
    return (torch.clone, transposed, sparse) if can.strided else (torch.clone,)


def same(found: Tensor, expected: Tensor, *what: object) -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    assert torch.equal(found, expected), (*what, found, expected)


def folded(op: Any, parts: list[Tensor]) -> Tensor:
    """What an all-reduce of these gives."""
    if op == dist.ReduceOp.AVG:
        return (reduce(torch.add, parts).double() / len(parts)).to(parts[0].dtype)
    python = {
        dist.ReduceOp.SUM: torch.add,
        dist.ReduceOp.PRODUCT: torch.mul,
        dist.ReduceOp.MIN: torch.minimum,
        dist.ReduceOp.MAX: torch.maximum,
        dist.ReduceOp.BAND: torch.bitwise_and,
        dist.ReduceOp.BOR: torch.bitwise_or,
        dist.ReduceOp.BXOR: torch.bitwise_xor,
    }
    return reduce(python[op], parts)


def operators(can: Abilities, dtype: torch.dtype) -> Iterator[Any]:
    yield from (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX)
    if not dtype.is_floating_point:
        yield from BITWISE
    else:
        yield dist.ReduceOp.AVG


# ---- the collectives


def all_reduce_sums_every_dtype(can: Abilities) -> None:
    for dtype in NUMBERS:
        for op in operators(can, dtype):
            for length in (0, 1, 17, 1000):
                parts = [numbers(r, (length,), dtype) for r in range(size())]
                x = parts[rank()].clone()
                dist.all_reduce(x, op)
                same(x, folded(op, parts), dtype, op, length)


def all_reduce_takes_any_layout(can: Abilities) -> None:
    shape = (5, 33, 7)
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), layouts(can)):
        x = layout(numbers(rank(), shape, dtype))
        around = x.as_strided((), (), 0).clone() if layout is sparse else None
        dist.all_reduce(x)
        parts = [numbers(r, shape, dtype) for r in range(size())]
        same(x, folded(dist.ReduceOp.SUM, parts), dtype, layout)
        if around is not None:
            assert x.as_strided((), (), 0) == around, "wrote beside the tensor"


def all_reduce_of_large_tensors(can: Abilities) -> None:
    for length in (262_144, 1_500_003):
        parts = [numbers(r, (length,), torch.float32, 3) for r in range(size())]
        x = parts[rank()].clone()
        dist.all_reduce(x)
        same(x, folded(dist.ReduceOp.SUM, parts), length)


def all_reduce_of_complex_and_bool(can: Abilities) -> None:
    parts = [torch.complex(*numbers(r, (2, 9), torch.float32)) for r in range(size())]
    x = parts[rank()].clone()
    dist.all_reduce(x)
    same(x, reduce(torch.add, parts))
    flags = [numbers(r, (50,), torch.bool) for r in range(size())]
    x = flags[rank()].clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    same(x, reduce(torch.logical_or, flags))


def all_ranks_hold_the_same_bits(can: Abilities) -> None:
    for dtype in FLOATS:
        x = torch.randn(4097, generator=torch.Generator().manual_seed(rank())).to(dtype)
        dist.all_reduce(x)
        first = x.clone()
        dist.broadcast(first, 0)
        same(x, first, dtype)


def reduce_reaches_its_root(can: Abilities) -> None:
    for root, dtype in itertools.product(range(size()), (torch.float32, torch.int64)):
        parts = [numbers(r, (130,), dtype, root) for r in range(size())]
        x = parts[rank()].clone()
        dist.reduce(x, root)
        if rank() == root:
            same(x, folded(dist.ReduceOp.SUM, parts), root, dtype)


def broadcast_moves_every_dtype(can: Abilities) -> None:
    for root, dtype in itertools.product(range(size()), MOVED):
        for layout in layouts(can):
            x = layout(numbers(rank(), (3, 50), dtype))
            dist.broadcast(x, root)
            same(x, numbers(root, (3, 50), dtype), root, dtype)


def gather_and_scatter(can: Abilities) -> None:
    for root, dtype in itertools.product(range(size()), (torch.float32, torch.bool, torch.int64)):
        parts = [numbers(r, (4, 9), dtype, root) for r in range(size())]
        found = [torch.empty_like(parts[0]) for _ in parts] if rank() == root else None
        dist.gather(parts[rank()], found, root)
        for r, part in enumerate(found or []):
            same(part, parts[r], root, dtype)
        x = torch.empty_like(parts[0])
        dist.scatter(x, parts if rank() == root else None, root)
        same(x, parts[rank()], root, dtype)


def all_gather_keeps_the_order(can: Abilities) -> None:
    for dtype, layout in itertools.product(MOVED, layouts(can)):
        parts = [numbers(r, (4, 9), dtype) for r in range(size())]
        found = [layout(torch.zeros_like(parts[0])) for _ in parts]
        dist.all_gather(found, layout(parts[rank()]))
        for r, part in enumerate(found):
            same(part, parts[r], dtype, layout)
        whole = torch.empty(4 * size(), 9, dtype=dtype)
        dist.all_gather_into_tensor(whole, parts[rank()])
        same(whole, torch.cat(parts), dtype)


def all_gather_of_unequal_parts(can: Abilities) -> None:
    parts = [numbers(r, (3 * r, 5), torch.float32) for r in range(size())]
    found = [torch.empty_like(part) for part in parts]
    dist.all_gather(found, parts[rank()])
    for r, part in enumerate(found):
        same(part, parts[r])


def all_gather_in_place(can: Abilities) -> None:
    parts = [numbers(r, (11,), torch.float32) for r in range(size())]
    whole = torch.zeros(11 * size())
    own = whole[11 * rank() : 11 * (rank() + 1)]
    own.copy_(parts[rank()])
    dist.all_gather_into_tensor(whole, own)
    same(whole, torch.cat(parts))


def reduce_scatter_keeps_the_own_part(can: Abilities) -> None:
    for dtype, length in itertools.product(FLOATS, (0, 1, 33)):
        parts = [numbers(r, (size(), length), dtype) for r in range(size())]
        expected = folded(dist.ReduceOp.SUM, parts)[rank()]
        x = torch.empty(length, dtype=dtype)
        dist.reduce_scatter_tensor(x, parts[rank()].flatten())
        same(x, expected, dtype, length)
        x = torch.empty(length, dtype=dtype)
        dist.reduce_scatter(x, list(parts[rank()]))
        same(x, expected, dtype, length)


def reduce_scatter_of_unequal_parts(can: Abilities) -> None:
    lengths = [(5 * r + 3) % 7 * (1 + 999 * (r == 2)) for r in range(size())]
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        for asynchronous in (False, True):
            parts = [[numbers(r, (n, 2), torch.float64, n) for n in lengths] for r in range(size())]
            x = torch.empty(lengths[rank()], 2, dtype=torch.float64)
            given = [part.clone() for part in parts[rank()]]
            work = dist.reduce_scatter(x, given, op, async_op=asynchronous)
            if asynchronous:
                work.wait()
            same(x, folded(op, [part[rank()] for part in parts]), op)
            for before, after in zip(parts[rank()], given, strict=True):
                same(after, before, "a part was written to")


def all_to_all_transposes(can: Abilities) -> None:
    for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.bool):
        parts = [numbers(r, (size(), 6), dtype) for r in range(size())]
        expected = torch.stack([part[rank()] for part in parts])
        x = torch.empty(size(), 6, dtype=dtype)
        dist.all_to_all_single(x, parts[rank()])
        same(x, expected, dtype)
        rows = list(torch.empty(size(), 6, dtype=dtype))
        dist.all_to_all(rows, [part.clone() for part in parts[rank()]])
        same(torch.stack(rows), expected, dtype)


def all_to_all_of_uneven_runs(can: Abilities) -> None:
    for scale, width in ((1, 3), (3000, 17)):
        counts = torch.randint(0, 5, (size(), size()), generator=torch.Generator().manual_seed(5))
        counts *= scale
        send = counts[rank()].tolist()
        receive = counts[:, rank()].tolist()
        rows = [numbers(r, (int(counts[r].sum()), width), torch.float32) for r in range(size())]
        x = torch.empty(sum(receive), width)
        dist.all_to_all_single(x, rows[rank()], receive, send)
        expected = torch.cat([rows[r].split(counts[r].tolist())[rank()] for r in range(size())])
        same(x, expected)


def all_to_all_of_unequal_tensors(can: Abilities) -> None:
    """Some are empty, one rank's are all of one size, and nobody need wait for the work."""
    counts = [
        [4] * size() if a == 1 else [(a + 2 * b) % 5 for b in range(size())] for a in range(size())
    ]
    counts = [[4 if b == a else n for b, n in enumerate(row)] for a, row in enumerate(counts)]
    parts = [
        [numbers(a, (n, 3), torch.float32, b) for b, n in enumerate(row)]
        for a, row in enumerate(counts)
    ]
    expected = [row[rank()] for row in parts]
    for how in ("wait", "poll", "future", "drop", ""):
        found = [torch.full_like(part, 9) for part in expected]
        work = dist.all_to_all(found, [part.clone() for part in parts[rank()]], async_op=bool(how))
        if how == "wait":
            work.wait()
        elif how == "poll":
            while not work.is_completed():
                time.sleep(1e-3)
        elif how == "future":
            assert len(work.get_future().wait()) == size()
        elif how == "drop":
            del work
            appears(lambda found=found: not any((part == 9).any() for part in found), 20)
        for part, wanted in zip(found, expected, strict=True):
            same(part, wanted, how)


def coalesced_calls(can: Abilities) -> None:
    manager = dist.distributed_c10d._coalescing_manager
    lengths = (3, 40, 500)
    sums = [numbers(rank(), (n,), torch.float32, n) for n in lengths]
    with manager():
        for x in sums:
            dist.all_reduce(x)
    for n, x in zip(lengths, sums, strict=True):
        same(x, reduce(torch.add, [numbers(r, (n,), torch.float32, n) for r in range(size())]))
    wholes = [torch.empty(n * size()) for n in lengths]
    with manager(async_ops=True) as work:
        for n, whole in zip(lengths, wholes, strict=True):
            dist.all_gather_into_tensor(whole, numbers(rank(), (n,), torch.float32, n))
    work.wait()
    for n, whole in zip(lengths, wholes, strict=True):
        same(whole, torch.cat([numbers(r, (n,), torch.float32, n) for r in range(size())]))


def asynchronous_calls_keep_their_order(can: Abilities) -> None:
    tensors = [numbers(rank(), (300,), torch.float32, i) for i in range(8)]
    works = [dist.all_reduce(x, async_op=True) for x in tensors]
    last = numbers(rank(), (10,), torch.int64)
    dist.all_reduce(last)
    for i in reversed(range(8)):
        works[i].wait()
        assert works[i].is_completed()
        expected = reduce(torch.add, [numbers(r, (300,), torch.float32, i) for r in range(size())])
        same(tensors[i], expected)
    same(last, reduce(torch.add, [numbers(r, (10,), torch.int64) for r in range(size())]))


def futures_hold_the_result(can: Abilities) -> None:
    x = torch.full((5,), float(rank()))
    future = dist.all_reduce(x, async_op=True).get_future()
    future.wait()
    same(future.value()[0], torch.full((5,), float(sum(range(size())))))


def objects_travel(can: Abilities) -> None:
    mine = {"rank": rank(), "name": "x" * 100 * rank()}
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, mine)
    assert [f["rank"] for f in found] == list(range(size()))
    box = [mine if rank() == 1 else None]
    dist.broadcast_object_list(box, 1)
    assert box[0] == found[1]
    out: list[Any] = [None]
    dist.scatter_object_list(out, found if rank() == 0 else None, 0)
    assert out[0] == mine
    gathered: list[Any] | None = [None] * size() if rank() == 2 else None
    dist.gather_object(mine, gathered, 2)
    assert gathered is None or gathered == found


def a_barrier_holds_everyone(can: Abilities) -> None:
    for _ in range(5):
        dist.barrier()


# ---- point to point


def sends_are_received(can: Abilities) -> None:
    for dtype, length in ((torch.float32, 7), (torch.bool, 7), (torch.float64, 300_000)):
        x = numbers(rank(), (length,), dtype)
        if rank() % 2 == 0:
            dist.send(x, rank() + 1)
            dist.recv(x, rank() + 1)
            same(x, numbers(rank() + 1, (length,), dtype, 1))
        else:
            dist.recv(x, rank() - 1)
            same(x, numbers(rank() - 1, (length,), dtype))
            dist.send(numbers(rank(), (length,), dtype, 1), rank() - 1)


def sends_that_nobody_waits_for_arrive(can: Abilities) -> None:
    peer = rank() ^ 1
    for length in (3, 300_000):
        y = torch.zeros(length)
        for tag in range(3):
            dist.isend(numbers(rank(), (length,), torch.float32, tag), peer, tag=tag)
        dist.barrier()
        for tag in (2, 0, 1):
            dist.recv(y, peer, tag=tag)
            same(y, numbers(peer, (length,), torch.float32, tag), tag)


def tags_are_matched_in_any_order(can: Abilities) -> None:
    peer = rank() ^ 1
    tensors = [numbers(rank(), (1 + 40_000 * tag,), torch.float32, tag) for tag in range(4)]
    sends = [dist.isend(x, peer, tag=tag) for tag, x in enumerate(tensors)]
    found = [torch.empty_like(x) for x in tensors]
    for tag in (2, 0, 3, 1):
        dist.recv(found[tag], peer, tag=tag)
        same(found[tag], numbers(peer, found[tag].shape, torch.float32, tag), tag)
    for work in sends:
        work.wait()


def rings_do_not_deadlock(can: Abilities) -> None:
    after, before = (rank() + 1) % size(), (rank() - 1) % size()
    for length in (3, 200_000):
        x = numbers(rank(), (length,), torch.float32)
        y = torch.empty_like(x)
        pair = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, y, before)]
        for work in dist.batch_isend_irecv(pair if rank() % 2 else pair[::-1]):
            work.wait()
        same(y, numbers(before, (length,), torch.float32))


def a_rank_may_send_to_itself(can: Abilities) -> None:
    x, y = numbers(rank(), (9,), torch.float32), torch.zeros(9)
    if can.itself:
        sent = dist.isend(x, rank(), tag=5)
        dist.irecv(y, rank(), tag=5).wait()
        sent.wait()
        same(y, x)
    else:
        for call in (dist.isend, dist.irecv):
            with pytest.raises(ValueError, match="to itself"):
                call(x, rank())


def anyone_may_send(can: Abilities) -> None:
    if not can.any_source:
        return
    if rank():
        dist.send(torch.tensor([rank()]), 0, tag=4)
        return
    seen = set()
    for _ in range(size() - 1):
        x = torch.zeros(1, dtype=torch.int64)
        source = dist.recv(x, tag=4)
        assert source == int(x)
        seen.add(source)
    assert seen == set(range(1, size()))


def sends_and_collectives_do_not_mix(can: Abilities) -> None:
    x = torch.full((100_000,), float(rank()))
    y = torch.empty_like(x)
    peer = rank() ^ 1
    sent = dist.isend(x.clone(), peer)
    total = dist.all_reduce(x, async_op=True)
    dist.recv(y, peer)
    same(y, torch.full((100_000,), float(peer)))
    total.wait()
    sent.wait()
    same(x, torch.full((100_000,), float(sum(range(size())))))


# ---- groups


@contextmanager
def groups_of(*members: list[int]) -> Iterator[list[Any]]:
    groups = [dist.new_group(ranks) for ranks in members]
    yield groups
    for ranks, group in zip(members, groups, strict=True):
        if rank() in ranks:
            dist.destroy_process_group(group)


def groups_work_apart(can: Abilities) -> None:
    pairs = [[0, 1], [2, 3]]
    across = [[0, 2], [1, 3]]
    with groups_of(*pairs, *across, [3, 1, 0], [rank() for _ in range(1)]) as groups:
        for ranks, group in zip([*pairs, *across, [0, 1, 3]], groups[:5], strict=True):
            if rank() not in ranks:
                continue
            x = torch.tensor([10 ** rank()])
            dist.all_reduce(x, group=group)
            assert int(x) == sum(10**r for r in ranks)
            dist.broadcast(x, ranks[-1], group=group)
            y = torch.tensor([rank()])
            dist.broadcast(y, ranks[-1], group=group)
            assert int(y) == ranks[-1]
    with groups_of([0, 1]) as (again,):
        x = torch.ones(3)
        if rank() < 2:
            dist.all_reduce(x, group=again)
            same(x, torch.full((3,), 2.0))


def a_group_of_one(can: Abilities) -> None:
    with groups_of(*[[r] for r in range(size())]) as groups:
        own = groups[rank()]
        x = torch.arange(5.0)
        dist.all_reduce(x, group=own)
        dist.broadcast(x, rank(), group=own)
        y = torch.empty(5)
        dist.all_gather_into_tensor(y, x, group=own)
        z = torch.empty(5)
        dist.reduce_scatter_tensor(z, y, group=own)
        dist.all_to_all_single(y, z, group=own)
        same(y, torch.arange(5.0))


def groups_progress_behind_each_other(can: Abilities) -> None:
    """Ranks issue two groups' calls in opposite orders: only an asynchronous call may wait for a synchronous one."""
    pairs = [[0, 1], [2, 3]]
    with groups_of(*pairs, [0, 1, 2, 3]) as groups:
        pair = groups[rank() // 2]
        x, y = torch.ones(70_000), torch.ones(70_000)
        if rank() % 2:
            dist.all_reduce(y, group=groups[2])
            dist.all_reduce(x, group=pair)
        else:
            first = dist.all_reduce(x, group=pair, async_op=True)
            dist.all_reduce(y, group=groups[2])
            first.wait()
        same(x, torch.full((70_000,), 2.0))
        same(y, torch.full((70_000,), 4.0))


def functional_collectives(can: Abilities) -> None:
    group = dist.group.WORLD
    x = torch.full((size(), 3), float(rank()))
    total = float(sum(range(size())))
    same(functional.all_reduce(x, "sum", group).clone(), torch.full((size(), 3), total))
    whole = functional.all_gather_tensor(x[0], 0, group).clone()
    same(whole, torch.arange(size()).float().repeat_interleave(3))
    part = functional.reduce_scatter_tensor(x, "sum", 0, group).clone()
    same(part, torch.full((1, 3), total))
    turned = functional.all_to_all_single(x, None, None, group).clone()
    same(turned, torch.arange(size()).float()[:, None].expand(size(), 3).contiguous())


CHECKS: tuple[Check, ...] = (
    all_reduce_sums_every_dtype,
    all_reduce_takes_any_layout,
    all_reduce_of_large_tensors,
    all_reduce_of_complex_and_bool,
    all_ranks_hold_the_same_bits,
    reduce_reaches_its_root,
    broadcast_moves_every_dtype,
    gather_and_scatter,
    all_gather_keeps_the_order,
    all_gather_of_unequal_parts,
    all_gather_in_place,
    reduce_scatter_keeps_the_own_part,
    reduce_scatter_of_unequal_parts,
    all_to_all_transposes,
    all_to_all_of_uneven_runs,
    all_to_all_of_unequal_tensors,
    coalesced_calls,
    asynchronous_calls_keep_their_order,
    futures_hold_the_result,
    objects_travel,
    a_barrier_holds_everyone,
    sends_are_received,
    sends_that_nobody_waits_for_arrive,
    tags_are_matched_in_any_order,
    rings_do_not_deadlock,
    a_rank_may_send_to_itself,
    anyone_may_send,
    sends_and_collectives_do_not_mix,
    groups_work_apart,
    a_group_of_one,
    groups_progress_behind_each_other,
    functional_collectives,
)


def run_all(checks: tuple[Check, ...], can: Abilities) -> list[str]:
    """Run the checks in this rank; say which ones passed."""
    passed = []
    for check in checks:
        check(can)
        dist.barrier()
        passed.append(check.__name__)
    return passed
