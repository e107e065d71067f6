"""Thousands of random collectives over shm, every result checked; and that a broken protocol does not pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plait.collectives import shm
from plait.collectives.shm.steps import SETS as SETS_WORD
from world import RankError, current_rank, run_world

RANKS = 4
LENGTHS = (0, 1, 7, 64, 500, 3000)
LONG = (70_000, 400_000)
SETS = ((0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 2, 3))


class Soak:
    """Draws the same calls on every rank. A rank brings `ramp + call + 1000 * rank`, so results have a closed form."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.rank = dist.get_rank()
        self.groups = [dist.new_group(list(ranks)) for ranks in SETS]
        self.ramp = torch.arange(max(LONG) * RANKS)
        self.pending: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def step(self, call: int) -> None:
        draw = self.draw
        which = draw.randrange(len(SETS))
        kind = draw.choice((self.reduce, self.gather, self.exchange, self.spread, self.ring))
        n = draw.choice(LONG) if draw.random() < 0.003 else draw.choice(LENGTHS)
        root, later = draw.randrange(RANKS), draw.random() < 0.3
        ranks = SETS[which]
        if self.rank in ranks:
            work, found, expected = kind(
                self.groups[which], ranks, n, call, ranks[root % len(ranks)]
            )
            self.pending.append((work, found, expected))
        if not later:
            self.settle()

    def settle(self) -> None:
        for work, found, expected in reversed(self.pending):
            work.wait()
            assert torch.equal(found, expected), (found, expected)
        self.pending.clear()

    def brought(self, of: int, n: int, call: int) -> torch.Tensor:
        return self.ramp[:n] + (call + 1000 * of)

    def reduce(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        x = self.brought(self.rank, n, call)
        work = dist.all_reduce(x, group=group, async_op=True)
        total = self.ramp[:n] * len(ranks) + sum(call + 1000 * r for r in ranks)
        return work, x, total

    def gather(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        out = torch.empty(n * len(ranks), dtype=torch.int64)
        x = self.brought(self.rank, n, call)
        work = dist.all_gather_single(out, x, group=group, async_op=True)
        return work, out, torch.cat([self.brought(r, n, call) for r in ranks])

    def exchange(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        out = torch.empty(n * len(ranks), dtype=torch.int64)
        x = self.brought(self.rank, n * len(ranks), call)
        work = dist.all_to_all_single(out, x, group=group, async_op=True)
        at = ranks.index(self.rank)
        parts = [self.ramp[at * n : (at + 1) * n] + (call + 1000 * r) for r in ranks]
        return work, out, torch.cat(parts)

    def spread(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        x = self.brought(self.rank, n, call)
        work = dist.broadcast(x, root, group=group, async_op=True)
        return work, x, self.brought(root, n, call)

    def ring(self, group: Any, ranks: Any, n: int, call: int, root: int) -> Any:
        at = ranks.index(self.rank)
        after, before = ranks[(at + 1) % len(ranks)], ranks[at - 1]
        out = torch.empty(n, dtype=torch.int64)
        receive = dist.irecv(out, before, group=group, tag=call)
        dist.isend(self.brought(self.rank, n, call), after, group=group, tag=call)
        return receive, out, self.brought(before, n, call)


def soak(folder: str, calls: int, seed: int, sets: int) -> int:
    shm.register()
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=RANKS)
    run = Soak(seed)
    for group in run.groups:
        if isinstance(group, shm.ShmGroup):
            group.engine.state[SETS_WORD] = sets - 1
    for call in range(calls):
        run.step(call)
    run.settle()
    dist.barrier()
    return calls


def test_ten_thousand_calls(tmp_path: Path) -> None:
    run_world(soak, RANKS, str(tmp_path), 10_000, 1, 2, backend=None, timeout=300)


@pytest.mark.slow
def test_a_hundred_thousand_calls(tmp_path: Path) -> None:
    run_world(soak, RANKS, str(tmp_path), 100_000, 2, 2, backend=None, timeout=2000)


def test_one_set_of_slots_does_not_pass(tmp_path: Path) -> None:
    """The negative control: without the second set a rank overwrites what another still reads."""
    with pytest.raises(RankError) as failed:
        run_world(soak, RANKS, str(tmp_path), 10_000, 1, 1, backend=None, timeout=300)
    assert failed.value.kind in ("AssertionError", "CallMismatch", "PeerLost", "Timeout")
