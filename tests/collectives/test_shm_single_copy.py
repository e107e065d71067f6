"""Reading another process's memory instead of a slot: every form of call, who may not be read, and when it pays."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from plait.collectives import PeerLost, shm
from plait.collectives.shm import members, single_copy
from plait.collectives.shm.single_copy import ALWAYS, BY_COST, CARELESS, NEVER
from plait.collectives.shm.steps import FIRST_INPUT, OFFERS, SINGLE
from world import RankError, current_rank, run_world

RANKS = 3
N = 131 * 1024  # float32 for a rank: more than one turn of a slot, and no whole number of them


def open_world(folder: str, size: int = RANKS) -> np.ndarray:
    shm.register()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=size)
    group = dist.group.WORLD
    assert isinstance(group, shm.ShmGroup)
    return group.engine.state


def brought(of: int, n: int, seed: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32) + 1000 * of + seed


def gathers(seed: int, n: int) -> None:
    rank = dist.get_rank()
    every = torch.cat([brought(r, n, seed) for r in range(RANKS)])
    out, x = torch.empty(RANKS * n), brought(rank, n, seed)
    dist.all_gather_single(out, x)
    x.fill_(-1)  # whoever has returned may write again
    assert torch.equal(out, every)
    out = torch.full((RANKS * n,), -1.0)
    out[rank * n : (rank + 1) * n] = brought(rank, n, seed)
    dist.all_gather_single(out, out[rank * n : (rank + 1) * n])  # in place
    assert torch.equal(out, every)
    strided = torch.empty(n, RANKS).t()
    dist.all_gather(list(strided), brought(rank, n, seed))  # into columns
    assert torch.equal(strided, every.view(RANKS, n))


def exchanges(seed: int, n: int) -> None:
    rank = dist.get_rank()
    expected = torch.cat(
        [brought(r, RANKS * n, seed)[rank * n : (rank + 1) * n] for r in range(RANKS)]
    )
    out, x = torch.empty(RANKS * n), brought(rank, RANKS * n, seed)
    work = dist.all_to_all_single(out, x, async_op=True)
    work.wait()
    x.fill_(-1)
    assert torch.equal(out, expected)
    runs = [n * (r + 1) for r in range(RANKS)]  # to rank r: r + 1 times n
    x, out = brought(rank, sum(runs), seed), torch.empty(RANKS * runs[rank])
    dist.all_to_all_single(out, x, [runs[rank]] * RANKS, runs)
    x.fill_(-1)
    first = sum(runs[:rank])
    parts = [brought(r, sum(runs), seed)[first : first + runs[rank]] for r in range(RANKS)]
    assert torch.equal(out, torch.cat(parts))
    same = brought(rank, RANKS * n, seed)
    columns = same.view(n, RANKS).t().contiguous().t()  # strided: goes by way of slots
    into = torch.empty(RANKS, n)
    dist.all_to_all(list(into), list(columns.t()))
    parts = [brought(r, RANKS * n, seed).view(n, RANKS)[:, rank] for r in range(RANKS)]
    assert torch.equal(into, torch.stack(parts))


def all_forms(folder: str, ways: tuple[int, ...]) -> int:
    """Rank r sends in its own way; says how often it offered its memory."""
    state = open_world(folder)
    state[SINGLE] = ways[dist.get_rank()]
    offered = 0
    for seed, n in enumerate((N, 3 * N + 5, 100)):
        gathers(seed, n)
        offered += int(state[OFFERS])
        exchanges(seed, n)
        dist.all_gather_single(torch.empty(RANKS * n), torch.ones(n))
        offered += int(state[OFFERS])
    return offered


@pytest.mark.parametrize("ways", [(ALWAYS,) * 3, (ALWAYS, NEVER, ALWAYS), (BY_COST,) * 3])
def test_every_form_of_call(ways: tuple[int, ...], tmp_path: Path) -> None:
    offered = run_world(all_forms, RANKS, str(tmp_path), ways, backend=None)
    for way, times in zip(ways, offered, strict=True):
        if way != BY_COST:
            assert times == (2 if way == ALWAYS else 0), "not once where the output is strided"


def test_not_to_wait_for_readers_does_not_pass(tmp_path: Path) -> None:
    """The negative control: a sender that returns before it was read is seen writing its next numbers."""
    with pytest.raises(RankError) as failed:
        run_world(hurried, 2, str(tmp_path), CARELESS, backend=None)
    assert failed.value.kind == "AssertionError"


def test_a_sender_waits_until_it_was_read(tmp_path: Path) -> None:
    run_world(hurried, 2, str(tmp_path), ALWAYS, backend=None)


def hurried(folder: str, way: int) -> None:
    """Rank 0 writes again as soon as it has returned; rank 1 has more to read."""
    open_world(folder, 2)[SINGLE] = way
    rank = dist.get_rank()
    x = torch.empty(1 << 21)
    few, many = 100, x.numel() - 100
    received = [many, many] if rank else [few, few]
    into = torch.empty(sum(received))
    for turn in range(40):
        x.fill_(turn)
        dist.all_to_all_single(into, x, received, [few, many])
        x.fill_(-1)
        assert (into == turn).all()


def refused_on_one(folder: str) -> tuple[int, int]:
    if current_rank() == 1:
        members.can_read = lambda pid, address, word: False
    state = open_world(folder)
    gathers(0, N)
    exchanges(0, N)
    return int(state[SINGLE]), int(state[OFFERS])


def test_where_one_rank_may_not_read_all_copy_twice(tmp_path: Path) -> None:
    assert run_world(refused_on_one, RANKS, str(tmp_path), backend=None) == [(NEVER, 0)] * RANKS


def withheld_later(folder: str) -> str:
    state = open_world(folder, 2)
    dist.barrier()
    dist.group.WORLD.set_timeout(timedelta(seconds=1.5))  # type: ignore[union-attr]
    state[SINGLE] = ALWAYS
    if dist.get_rank() == 1:
        state[FIRST_INPUT + 2] = 2**22 + 1  # no process has this number
    with pytest.raises(PeerLost) as told:
        gathers_of_two()
    return str(told.value)


def gathers_of_two() -> None:
    dist.all_gather_single(torch.empty(2 * N), torch.ones(N))


def test_a_read_that_fails_ends_in_bounded_time(tmp_path: Path) -> None:
    by_0, by_1 = run_world(withheld_later, 2, str(tmp_path), backend=None)
    assert "all_gather" in by_0
    assert "rank 1" in by_0
    assert "rank 0" in by_1


def test_only_true_words_are_believed() -> None:
    word = np.array([77])
    assert single_copy.can_read(os.getpid(), word.ctypes.data, 77)
    assert not single_copy.can_read(os.getpid(), word.ctypes.data, 78)
    assert not single_copy.can_read(os.getpid(), 64, 77)
