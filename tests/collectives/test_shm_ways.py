"""The choice of the way through shared memory: the cheapest to all is taken, the others are tried again."""

from __future__ import annotations

import numpy as np
import pytest

from plait.collectives.shm import ways
from plait.collectives.shm.segment import Layout
from plait.collectives.shm.steps import (
    BEGAN,
    CAME,
    CONTROL,
    FILLING,
    FIRST_INPUT,
    LINE,
    LINE_BYTES,
    NOTED,
    RANK,
    TABLES,
    WAY,
    WAY_WORDS,
    WORLD,
    line_bytes,
)
from plait.collectives.shm.ways import (
    CLASS_WORDS,
    CLASSES,
    COST,
    EXCHANGE,
    FRESH,
    LEAST,
    LONG,
    MOVED,
    ONE,
    PAST,
    RETRY,
    SYMMETRIC,
    SYMMETRIC_NORM,
    THROUGH,
    TRIAL,
    TURN_BYTES,
)

SIZE = 64 << 10


def world(ranks: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The states of some ranks, and the lines that they show each other."""
    lines = np.zeros(2 * ranks * line_bytes(ranks) // 8, np.int64)
    states = []
    for rank in range(ranks):
        state = np.zeros(FIRST_INPUT + 2 * ranks, np.int64)
        state[[RANK, WORLD, CONTROL, LINE_BYTES]] = (
            rank, ranks, lines.ctypes.data, line_bytes(ranks)
        )  # fmt: skip
        states.append(state)
    return states, lines


def call(
    states: list[np.ndarray], costs: list[list[float]], count: int = SIZE, among: int = 3
) -> int:
    """Make one call by all ranks, whose ways take so many cycles for a KB; say which way they took."""
    for state in states:
        ways.choose(state, EXCHANGE, count, among, True)
        ways.filled(state)
    taken = {int(state[WAY]) for state in states}
    for state, cost in zip(states, costs, strict=True):
        ways.compare(state)
        state[FILLING] = 0
        state[CAME] = ways_clock() - int(cost[state[WAY]] * count / 1024)
        ways.end(state)
    assert len(taken) == 1, "all ranks take one way"
    return taken.pop()


def ways_clock() -> int:
    state = np.zeros(FIRST_INPUT + 2, np.int64)
    state[WORLD] = 1
    ways.choose(state, EXCHANGE, SIZE, 2, True)
    return int(state[BEGAN])


def settled(costs: list[list[float]], among: int = 3) -> list[int]:
    states, lines = world(len(costs))
    assert len(lines) > 0
    return [call(states, costs, among=among) for _ in range(RETRY)]


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ([[1e3, 5e3, 9e3]] * 2, PAST),
        ([[5e3, 1e3, 9e3]] * 2, THROUGH),
        ([[5e3, 9e3, 1e3]] * 2, ONE),
        ([[1e3, 3e3, 9e3], [9e3, 3e3, 9e3]], THROUGH),  # not each its own, but one for all
        ([[2e3, 4e3, 9e3], [2e3, 4e3, 9e3], [2e3, 1e3, 9e3]], PAST),
    ],
)
def test_the_cheapest_to_all_is_taken_once_each_was_tried(
    costs: list[list[float]], best: int
) -> None:
    found = settled(costs)
    tried = 3 * TRIAL
    assert found[:tried] == [PAST] * TRIAL + [THROUGH] * TRIAL + [ONE] * TRIAL
    again = {
        begin + turn for begin in (32, 64, 128, 256) for turn in range(TRIAL + 1)
    }  # one call sees what the last trial cost
    assert {way for n, way in enumerate(found[tried + 1 :], tried + 1) if n not in again} == {best}
    for begin in (32, 64, 128, 256):
        assert found[begin : begin + TRIAL] == [found[begin]] * TRIAL, "one way in a trial"
    assert {found[begin] for begin in (32, 64)} == {PAST, THROUGH, ONE} - {best}, (
        "each other in turn"
    )


def test_what_the_first_trial_saw_is_doubted_early() -> None:
    """It may have met pages that nobody had touched: the best way looked dear, and was not tried for 500 calls."""
    states, _ = world(2)
    cold, warm = [[9e3, 3e3]] * 2, [[1e3, 3e3]] * 2
    found = [call(states, cold, among=2) for _ in range(TRIAL)]
    found += [call(states, warm, among=2) for _ in range(200)]
    assert set(found[TRIAL:32]) == {THROUGH}
    assert found.count(THROUGH) < 60
    assert found[-1] == PAST


def test_a_change_of_the_machine_is_found_at_the_next_trial() -> None:
    states, _ = world(2)
    slow, fast = [[1e3, 9e3]] * 2, [[1e3, 0.5e3]] * 2
    assert {call(states, slow, among=2) for _ in range(RETRY)} == {PAST, THROUGH}
    found = [call(states, fast, among=2) for _ in range(2 * TRIAL)]
    assert set(found) == {THROUGH}
    found = [call(states, slow, among=2) for _ in range(40)]
    assert found[-1] == PAST, "what became dear is left at once"


@pytest.mark.parametrize(
    ("count", "expected"), [(SIZE, [0, 0, 1, 1]), (LONG - 1, [0, 0, 1, 1]), (LONG, [0, 1])]
)
def test_the_first_calls_of_a_trial_do_not_count(count: int, expected: list[int]) -> None:
    states, _ = world(1)
    counted, taken = [], []
    for _ in range(2 * len(expected)):
        ways.choose(states[0], EXCHANGE, count, 2, True)
        counted.append(int(states[0][NOTED]))
        taken.append(int(states[0][WAY]))
    assert counted == expected * 2
    assert taken == [PAST] * len(expected) + [THROUGH] * len(expected)


def test_one_interruption_is_doubted() -> None:
    states, _ = world(1)
    usual = [[1e3, 2e3]]
    for _ in range(40):
        call(states, usual, among=2)
    call(states, [[1e6, 2e3]], among=2)
    call(states, usual, among=2)
    found = [call(states, usual, among=2) for _ in range(20)]
    assert set(found) == {PAST}


@pytest.mark.parametrize(
    ("way", "moved", "share"),
    [
        (THROUGH, SIZE, FRESH),
        (THROUGH, TURN_BYTES - 1, FRESH),
        (THROUGH, TURN_BYTES, 1),  # it comes round to lines that it wrote before
        (THROUGH, 0, 1),  # too large to move on
        (PAST, SIZE, 1),
        (ONE, SIZE, 1),
    ],
)
def test_a_call_among_lines_that_nobody_touched_is_taken_for_less(
    way: int, moved: int, share: float
) -> None:
    (state,), _ = world(1)
    ways.choose(state, EXCHANGE, SIZE, 3, True)
    words = int(state[WAY_WORDS])
    state[[WAY, NOTED]] = way, 1
    state[words + MOVED] = moved
    state[CAME] = ways_clock() - 100_000 * SIZE // 1024
    ways.end(state)
    assert state[words + COST + way] / 100_000 == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize(("cold", "warm", "best"), [(1.5, 0.7, THROUGH), (1.7, 1.6, PAST)])
def test_through_the_cache_is_judged_by_what_it_will_cost(
    cold: float, warm: float, best: int
) -> None:
    """Its first turn costs twice the later ones: it is held to it, unless it is the wrong way."""
    (state,), _ = world(1)
    words, past, found = ways.words_of(EXCHANGE, SIZE), 1e4, []
    for _ in range(40 + 2 * TURN_BYTES // SIZE):
        ways.choose(state, EXCHANGE, SIZE, 2, True)
        ways.filled(state)
        way = int(state[WAY])
        state[words + MOVED] += SIZE * (way == THROUGH)
        through = cold if state[words + MOVED] < TURN_BYTES else warm
        ways.compare(state)
        state[FILLING] = 0
        state[CAME] = ways_clock() - int((through if way == THROUGH else 1) * past * SIZE / 1024)
        ways.end(state)
        found.append(way)
    again = {32 + turn for turn in range(TRIAL + 1)} | {64 + turn for turn in range(TRIAL + 1)}
    assert {way for n, way in enumerate(found) if n > 2 * TRIAL and n not in again} == {best}


def test_small_calls_and_such_as_not_all_make_are_not_timed() -> None:
    states, _ = world(1)
    ways.choose(states[0], EXCHANGE, LEAST - 1, 2, True)
    assert states[0][WAY] == THROUGH
    ways.choose(states[0], EXCHANGE, LEAST, 2, False)
    assert (states[0][WAY], states[0][NOTED]) == (PAST, 0)
    assert not states[0][TABLES:FIRST_INPUT].any()


def test_every_class_has_words_of_its_own() -> None:
    assert ways.words_of(SYMMETRIC, 1 << 40) + COST + ONE < FIRST_INPUT
    firsts = {ways.words_of(EXCHANGE, LEAST << k) for k in range(CLASSES)}
    assert len(firsts) == CLASSES
    assert max(firsts) + CLASS_WORDS == ways.words_of(EXCHANGE + 1, LEAST)


@pytest.mark.parametrize("ranks", [2, 9, 10, 40])
def test_lines_of_any_world_are_whole_and_its_own(ranks: int) -> None:
    assert line_bytes(ranks) % LINE == 0
    assert Layout(ranks).notes == 2 * ranks * line_bytes(ranks)


def test_each_kind_of_call_learns_apart() -> None:
    begins = [
        ways.words_of(kind, LEAST << size)
        for kind in range(SYMMETRIC_NORM + 1)
        for size in range(CLASSES)
    ]
    assert begins == list(range(TABLES, FIRST_INPUT, CLASS_WORDS))
