"""Stores where other ranks read: both ways copy the same bytes, and the cheaper one is taken."""

from __future__ import annotations

import numpy as np
import pytest

from plait.collectives.shm import stores
from plait.collectives.shm.steps import COST, FIRST_INPUT, GIVEN, PAST

pytestmark = pytest.mark.skipif(not stores.X86, reason="only x86 has a choice of stores")


@pytest.mark.parametrize("count", [1, 31, 1023, 1024, 4097, 200_001])
@pytest.mark.parametrize("past", [0, 1])
def test_every_byte_arrives_and_no_other(past: int, count: int) -> None:
    draw = np.random.default_rng(count)
    for to, of in ((0, 0), (5, 0), (32, 17), (63, 1)):
        state = np.zeros(FIRST_INPUT, np.int64)
        state[PAST] = past
        source = draw.integers(0, 256, count + 64, np.uint8)
        target = np.full(count + 192, 7, np.uint8)
        stores.give(state, target.ctypes.data + 64 + to, source.ctypes.data + of, count)
        assert (target[64 + to : 64 + to + count] == source[of : of + count]).all()
        assert (target[: 64 + to] == 7).all()
        assert (target[64 + to + count :] == 7).all()


def notes(state: np.ndarray, *costs: tuple[int, int]) -> int:
    for past, cost in costs:
        stores.note_cost(state, past, cost)
    return int(state[PAST])


def test_the_cheaper_way_is_taken() -> None:
    state = np.zeros(FIRST_INPUT, np.int64)
    assert notes(state, (0, 60)) == 0
    assert notes(state, (1, 100)) == 0, "dearer"
    assert notes(state, *[(0, 1200)] * 4) == 1, "lines that must be taken away"
    assert notes(state, (1, 100_000)) == 1, "one slow copy is an interruption"
    assert notes(state, (0, 90)) == 0, "lines come for nothing again"


def test_the_other_way_is_tried_again() -> None:
    state = np.zeros(FIRST_INPUT, np.int64)
    target, source = np.zeros(2048, np.uint8), np.ones(2048, np.uint8)
    for _ in range(stores.RETRY):
        assert state[COST + 1] == 0
        stores.give(state, target.ctypes.data, source.ctypes.data, 2048)
    assert state[GIVEN] == stores.RETRY
    assert state[COST + 1] > 0
