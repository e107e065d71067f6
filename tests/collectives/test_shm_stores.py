"""Stores where other ranks read: both ways copy the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from plait.collectives.shm import stores
from plait.collectives.shm.steps import FIRST_INPUT, WAY
from plait.collectives.shm.ways import PAST, THROUGH

pytestmark = pytest.mark.skipif(not stores.X86, reason="only x86 has a choice of stores")


@pytest.mark.parametrize("count", [1, 31, 1023, 1024, 4097, 200_001])
@pytest.mark.parametrize("way", [PAST, THROUGH])
def test_every_byte_arrives_and_no_other(way: int, count: int) -> None:
    draw = np.random.default_rng(count)
    for to, of in ((0, 0), (5, 0), (32, 17), (63, 1)):
        state = np.zeros(FIRST_INPUT, np.int64)
        state[WAY] = way
        source = draw.integers(0, 256, count + 64, np.uint8)
        target = np.full(count + 192, 7, np.uint8)
        stores.give(state, target.ctypes.data + 64 + to, source.ctypes.data + of, count)
        assert (target[64 + to : 64 + to + count] == source[of : of + count]).all()
        assert (target[: 64 + to] == 7).all()
        assert (target[64 + to + count :] == 7).all()


@pytest.mark.parametrize("count", [1, 33, 4097, 200_001])
def test_every_byte_arrives_in_both_places(count: int) -> None:
    draw = np.random.default_rng(count)
    for past, home, of in ((0, 0, 0), (5, 3, 0), (32, 1, 17), (63, 64, 1)):
        source = draw.integers(0, 256, count + 64, np.uint8)
        targets = np.full((2, count + 192), 7, np.uint8)
        places = [row.ctypes.data + 64 + to for row, to in zip(targets, (past, home), strict=True)]
        stores.copy_past_and_home(*places, source.ctypes.data + of, count)
        for row, to in zip(targets, (past, home), strict=True):
            assert (row[64 + to : 64 + to + count] == source[of : of + count]).all()
            assert (row[: 64 + to] == 7).all()
            assert (row[64 + to + count :] == 7).all()
