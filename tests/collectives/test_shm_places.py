"""Where in its slot a rank shows its elements: calls through the cache move on, and leave the others' place alone."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from plait.collectives import shm
from plait.collectives.shm import places
from plait.collectives.shm.segment import RESULT, SLOT, STRIDE
from plait.collectives.shm.steps import (
    CONTROL,
    CURSORS,
    FIRST_INPUT,
    LINE_BYTES,
    RANK,
    READY,
    SETS,
    SLOT_BYTES,
    STEP,
    STRIDE_BYTES,
    WAY,
    WORLD,
    line_bytes,
)
from plait.collectives.shm.ways import (
    BEST,
    CALLS,
    CLASS_WORDS,
    CLASSES,
    EXCHANGE,
    LEAST,
    PAST,
    SYMMETRIC,
    THROUGH,
    words_of,
)
from world import current_rank, run_world

STAYS = SLOT // places.STAYS


def one_rank(way: int, ranks: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A rank whose slots begin at 0, and the lines that it writes."""
    lines = np.zeros(2 * ranks * line_bytes(ranks) // 8, np.int64)
    state = np.zeros(FIRST_INPUT + 2 * ranks, np.int64)
    state[[RANK, WORLD, CONTROL, LINE_BYTES]] = 0, ranks, lines.ctypes.data, line_bytes(ranks)
    state[[SETS, STEP, READY, WAY]] = 1, 1, 1, way
    state[[SLOT_BYTES, STRIDE_BYTES]] = SLOT, STRIDE
    return state, lines


def placed(state: np.ndarray, count: int, results: int = 0) -> tuple[int, int]:
    """Place one step; say where in the slot its elements and its results begin."""
    places.place_with_results(state, count, results)
    found = places.shown_by(state, 0), places.results_of(state, 0)
    base = (int(state[STEP]) & 1) * 2 * STRIDE
    state[STEP] += 1
    return found[0] - base, found[1] - base


@pytest.mark.parametrize("count", [4 << 10, 32 << 10, 100_001, 200 << 10])
def test_calls_through_the_cache_move_on_and_come_back(count: int) -> None:
    state, lines = one_rank(THROUGH)
    assert len(lines) > 0
    begun = [placed(state, count) for _ in range(2 * SLOT // count)]
    firsts = [first for first, _ in begun[::2]]
    assert firsts == [first for first, _ in begun[1::2]], "both sets alike"
    size = places.pages(count)
    turn = (SLOT - STAYS) // size
    assert firsts[:turn] == [STAYS + n * size for n in range(turn)]
    assert firsts[turn] == STAYS, "and then from the first"


def test_no_place_overlaps_another_of_its_turn_or_leaves_the_slot() -> None:
    state, _ = one_rank(THROUGH)
    draw = np.random.default_rng(0)
    taken = []
    for _ in range(400):
        count, results = (int(n) for n in draw.integers(4 << 10, 120 << 10, 2))
        first, second = placed(state, count, results)
        assert first >= STAYS
        assert first + count <= second
        assert second + results <= SLOT
        taken.append((first, second + results))
    for (_, end), (first, _) in pairwise(taken[::2]):
        assert first >= end or first == STAYS


@pytest.mark.parametrize(
    ("way", "count", "results"),
    [
        (PAST, 32 << 10, 16 << 10),  # its lines were never last written through the cache
        (THROUGH, places.LEAST - 1, 0),
        (THROUGH, STAYS, 1),
        (THROUGH, SLOT, RESULT),
    ],
)
def test_other_calls_stay(way: int, count: int, results: int) -> None:
    state, _ = one_rank(way)
    for _ in range(5):
        first, second = placed(state, count, results)
        assert first == 0
        assert count <= second
        assert second + results <= STRIDE


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_is_for_each_rank_has_a_place_of_its_own(ranks: int) -> None:
    state, _ = one_rank(PAST, ranks)
    for rank in range(ranks):
        state[RANK] = rank
        places.place(state, ranks * 4096, 4096, 0)
        begun = [
            places.shown_to(state, rank, to) - places.shown_by(state, rank) for to in range(ranks)
        ]
        assert sorted(begun) == [4096 * n for n in range(ranks)]
        assert begun[rank] == 4096 * (ranks - 1), "its own are the last, and may be left out"


def take_way(state: np.ndarray, way: int) -> None:
    """Have this rank take a way in its next call, whatever it is."""
    first = words_of(EXCHANGE, LEAST)
    for words in range(first, first + CLASSES * (SYMMETRIC + 1) * CLASS_WORDS, CLASS_WORDS):
        state[words + CALLS], state[words + BEST] = 20, way  # between two trials


def many_calls(folder: str, ways: tuple[int, ...]) -> None:
    """Every rank in a way of its own, over and over through its slot."""
    shm.register()
    rank, ranks = current_rank(), len(ways)
    store = dist.FileStore(f"{folder}/store", ranks)
    timeout = timedelta(seconds=60)
    dist.init_process_group("shm", store=store, rank=rank, world_size=ranks, timeout=timeout)
    group = dist.group.WORLD
    assert isinstance(group, shm.ShmGroup)
    n = 5003  # about 20 KB for a rank
    x, out, part = torch.empty(ranks * n), torch.empty(ranks * n), torch.empty(n)
    for turn in range(100):
        take_way(group.engine.state, ways[rank])
        base = torch.arange(ranks * n, dtype=torch.float32) + turn
        x.copy_(base + 7 * rank)
        dist.all_to_all_single(out, x)
        rows = [base[rank * n : (rank + 1) * n] + 7 * r for r in range(ranks)]
        assert torch.equal(out, torch.cat(rows))
        moved = group.engine.state[CURSORS:READY].any()
        assert moved == (ways[rank] == THROUGH)
        dist.reduce_scatter_single(part, x)
        assert torch.equal(part, torch.stack(rows).sum(0))
        take_way(group.engine.state, ways[rank])
        dist.all_gather_single(out, part)
        dist.all_reduce(x)
        assert torch.equal(out, x)
    dist.destroy_process_group()


def test_ranks_in_different_ways_find_each_other(tmp_path: Path) -> None:
    run_world(many_calls, 3, str(tmp_path), (PAST, THROUGH, THROUGH), backend=None)
