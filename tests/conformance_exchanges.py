"""What plait builds on any backend's messages: the ring, exchanges of tokens, and sparse collectives of chunks.

Checks for `conformance.run_all`; what must come is computed by each rank alone.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conformance import Abilities, Check, numbers, rank, same, size
from plait.collectives import Trace, primitive, sparse_exchange
from plait.collectives.ring_exchange import Homecoming, travel
from plait.collectives.sparse_exchange import (
    Placement,
    sparse_all_gather,
    sparse_reduce_scatter,
    start_sparse_all_gather,
)
from plait.collectives.token_exchange import counted

WIDTH = 6


def parts_travel_and_come_home(can: Abilities) -> None:
    """Uneven and empty parts visit every rank; what each adds is summed at home."""
    group = dist.group.WORLD
    sizes = [0, 70_000, 3, 41][: size()]
    sums, seen = Homecoming(group, sizes), []
    for source, part in travel(numbers(rank(), (sizes[rank()],), torch.float32), group, sizes):
        same(part, numbers(source, (sizes[source],), torch.float32), source)
        sums.add(part * (1 + rank()))
        seen.append(source)
    assert seen == [(rank() - step) % size() for step in range(size())]
    own = numbers(rank(), (sizes[rank()],), torch.float32)
    same(sums.home(), own * sum(range(1, size() + 1)))


def tokens_go_and_return(can: Abilities) -> None:
    table = [[(3 * a + 5 * b) % 4 for b in range(size())] for a in range(size())]
    exchange = counted(dist.group.WORLD, table)
    rows = numbers(rank(), (sum(table[rank()]), WIDTH), torch.float32)
    there = exchange.there(rows)
    came = [
        numbers(r, (sum(table[r]), WIDTH), torch.float32).split(table[r])[rank()]
        for r in range(size())
    ]
    same(there, torch.cat(came))
    same(exchange.back(there), rows)


def chunked_exchanges_overlap(can: Abilities) -> None:
    """All chunks of HOP-B's exchange are under way while this rank computes; they arrive in order."""
    brought = [numbers(rank(), (size() * 500, 9), torch.float32, i) for i in range(6)]
    started = [primitive.start_all_to_all(x, dist.group.WORLD) for x in brought]  # type: ignore[arg-type]
    torch.ones(200, 200).matmul(torch.ones(200, 200))
    for i, each in enumerate(started):
        parts = [numbers(r, (size(), 500, 9), torch.float32, i)[rank()] for r in range(size())]
        same(each.wait(), torch.cat(parts), i)


# ---- chunks

OWNERS = (0, 0, 1, 2, 1, 3, 2, 0)
COPIES: dict[int, list[int]] = {0: [1, 2, 3], 1: [1], 4: [0, 3], 5: [0, 1], 7: [1]}


def placement() -> Placement:
    return Placement.of(OWNERS, COPIES)


def chunk(number: int, dtype: torch.dtype = torch.float32, of: int = 0) -> Tensor:
    """What a rank has for a chunk."""
    return numbers(100 * of + number, (3, WIDTH), dtype)


def rows_of(chunks: list[int], dtype: torch.dtype, of: int = 0) -> Tensor:
    return torch.stack([chunk(number, dtype, of) for number in chunks])


def chunks_reach_their_holders(can: Abilities) -> None:
    placed, group = placement(), dist.group.WORLD
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        own = rows_of(placed.owned(rank()), dtype)
        found = sparse_all_gather(own, placed, group)
        same(found, rows_of(placed.held(rank()), dtype), dtype)
        parts = rows_of(placed.held(rank()), dtype, rank())
        total = sparse_reduce_scatter(parts, placed, group)
        expected = [
            torch.stack([chunk(number, dtype, r) for r in placed.holders[number]]).sum(0).to(dtype)
            for number in placed.owned(rank())
        ]
        same(total, torch.stack(expected), dtype)


def only_wanted_chunks_are_sent(can: Abilities) -> None:
    """Each rank's messages hold its copies and nothing else: less than an all-gather of everything."""
    placed, group = placement(), dist.group.WORLD
    own = rows_of(placed.owned(rank()), torch.float32)
    bytes_of_one = own[0].numel() * 4
    with Trace() as trace:
        held = sparse_all_gather(own, placed, group)
    sent = sum(e.sent_bytes for e in trace.events)
    assert {e.op for e in trace.events} <= {"send", "recv"}
    assert sent == placed.sent_chunks(rank()) * bytes_of_one
    with Trace() as trace:
        sparse_reduce_scatter(held, placed, group)
    away = len(placed.held(rank())) - len(placed.owned(rank()))
    assert sum(e.sent_bytes for e in trace.events) == away * bytes_of_one
    everywhere = len(placed.owned(rank())) * (size() - 1) * bytes_of_one
    assert sent < everywhere
    nobody = Placement.of(OWNERS, {})
    with Trace() as trace:
        same(sparse_all_gather(own, nobody, group), own)
    assert trace.events == []


def gradients_of_chunks_come_home(can: Abilities) -> None:
    placed, group = placement(), dist.group.WORLD
    own = rows_of(placed.owned(rank()), torch.float64).requires_grad_()
    held = sparse_all_gather(own, placed, group)
    (held * (1.0 + rank())).sum().backward()
    expected = [sum(1.0 + r for r in placed.holders[number]) for number in placed.owned(rank())]
    assert own.grad is not None
    same(own.grad, torch.tensor(expected, dtype=torch.float64)[:, None, None].expand_as(own))
    parts = rows_of(placed.held(rank()), torch.float64).requires_grad_()
    (sparse_reduce_scatter(parts, placed, group) * (1.0 + rank())).sum().backward()
    weights = [1.0 + placed.owners[number] for number in placed.held(rank())]
    assert parts.grad is not None
    same(parts.grad, torch.tensor(weights, dtype=torch.float64)[:, None, None].expand_as(parts))


def chunks_travel_while_a_rank_computes(can: Abilities) -> None:
    placed = placement()
    started = start_sparse_all_gather(
        rows_of(placed.owned(rank()), torch.float32), placed, dist.group.WORLD
    )
    torch.ones(200, 200).matmul(torch.ones(200, 200))
    same(started.wait(), rows_of(placed.held(rank()), torch.float32))


def wrong_placements_are_refused(can: Abilities) -> None:
    placed, group = placement(), dist.group.WORLD
    with pytest.raises(
        ValueError, match=rf"rank {rank()} owns \d chunks, but its tensor has shape"
    ):
        sparse_all_gather(torch.zeros(7, 2), placed, group)
    with pytest.raises(ValueError, match=rf"rank {rank()} holds \d chunks"):
        sparse_reduce_scatter(torch.zeros(9, 2), placed, group)
    with pytest.raises(ValueError, match=f"held by rank {size()}, but the group has {size()}"):
        sparse_all_gather(torch.zeros(1, 2), Placement.of([0], {0: [size()]}), group)
    with pytest.raises(ValueError, match="chunk 1 of rank 1 is held by"):
        Placement((0, 1), ((0,), (0, 2)))
    with pytest.raises(ValueError, match="2 owners for 1 chunks"):
        Placement((0, 1), ((0,),))


def swapped_runs_are_noticed(can: Abilities) -> None:
    """The negative control: holders that put the runs of a rank in the wrong rows."""
    placed, true = placement(), Placement.runs

    def wrong(self: Placement, owner: int, holder: int) -> list[sparse_exchange.Run]:
        rows = [(a + i, b + i) for a, b, n in true(self, owner, holder) for i in range(n)]
        return [(a, b, 1) for (a, _), (_, b) in zip(rows, rows[::-1], strict=True)]

    with patch.object(Placement, "runs", wrong):
        found = sparse_all_gather(
            rows_of(placed.owned(rank()), torch.float32), placed, dist.group.WORLD
        )
    wanted = torch.equal(found, rows_of(placed.held(rank()), torch.float32))
    seen = [None] * size()
    dist.all_gather_object(seen, wanted)
    assert not all(seen)


EXCHANGES: tuple[Check, ...] = (
    parts_travel_and_come_home,
    tokens_go_and_return,
    chunked_exchanges_overlap,
    chunks_reach_their_holders,
    only_wanted_chunks_are_sent,
    gradients_of_chunks_come_home,
    chunks_travel_while_a_rank_computes,
    wrong_placements_are_refused,
    swapped_runs_are_noticed,
)
