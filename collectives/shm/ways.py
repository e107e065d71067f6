"""Which way a call takes to where other ranks read, by what whole calls of its size cost all ranks of late.

Two ways go through the slots: stores past the cache (non-temporal), and ordinary stores. A store to a line that another
processor has read must first take the line from it, which inside one core complex costs little and between two 27 ns;
past the cache it costs the same in both, but the reader fetches from memory. Which is cheaper changes with the size,
and from minute to minute as a host moves the processors of a virtual machine. The third, for exchanges, is one copy
(single_copy.py). At intervals a few calls in a row try another way, and the first of them do not count: what lies in
the slots from the way before makes any look dear. Headers carry what the ways cost each rank; all add these up, so that
ranks agree on the next call's way without a message. A rank in another way is slower, never wrong.
"""

from __future__ import annotations

from ...cuda_kernels.kernel_cache import njit
from .steps import (
    BEGAN,
    CAME,
    DONE,
    FILLING,
    MISMATCH,
    NOTED,
    PEER,
    PHASE,
    PLACE,
    PRICES,
    SIZE,
    STEP,
    TABLES,
    WAITING,
    WAY,
    WAY_WORDS,
    WORLD,
    agree,
    all_came,
    begin,
    header_word,
    tell,
)
from .stores import PAST, cycles

THROUGH, ONE = 1, 2  # of state[WAY], besides PAST
EXCHANGE, REDUCE, SCATTER, NORM, SYMMETRIC, SYMMETRIC_NORM = range(6)
LEAST = 4 << 10  # bytes that are worth a choice
CLASSES = 12  # of sizes, each twice the one before; the last one has no end
# words of a class: how often it was chosen in, trials after the first, what all ranks hold to be cheapest, cycles for
# a KB by each way; bytes moved on by (places.py) since through the cache was held to be best
CALLS, TRIALS, BEST, MOVED, COST = range(5)
CLASS_WORDS = COST + 3
TRIAL, SETTLING = 4, 2  # calls of a trial, of which the first, as the first after it, do not count
# from so many bytes half of these, for one call of many steps goes through both sets of slots
LONG = 2 << 20
RETRY = 512  # calls from one trial to the next
# calls after which the first trials are doubted, and again after twice as many, up to RETRY
EARLY = 32
# Who moves on meets lines that nobody has touched for long, until it comes round: so far what a call costs is taken for
# this share of it. (Half as much was seen after the first turn, and several times as much where it is the wrong way.)
TURN_BYTES, FRESH = 3 << 19, 0.625
BITS = 21  # of a header's word for what a way costs


@njit(nogil=True)
def words_of(kind, count):
    """Find the words of the class of so many bytes."""
    number = 0
    while number < CLASSES - 1 and count >= LEAST << (number + 1):
        number += 1
    return TABLES + CLASS_WORDS * (CLASSES * kind + number)


@njit(nogil=True)
def retried(number):
    """Find the call with which the last trial began after the first ones: 32, 64, 128, 256, and then each RETRY."""
    begun = RETRY
    while begun > number:
        begun //= 2
    return number // RETRY * RETRY if number >= RETRY else begun if begun >= EARLY else 0


@njit(nogil=True)
def choose(state, kind, count, ways, timed):
    """Choose the way of a call in its first step, and begin to time it.

    Not `timed` are calls that not all ranks make alike: they take what is known.
    """
    if state[PLACE] > 0:
        return
    state[NOTED] = state[WAY_WORDS] = 0
    state[WAY] = THROUGH
    if count < LEAST:
        return
    words = words_of(kind, count)
    best = state[words + BEST]
    if best != THROUGH:
        state[words + MOVED] = 0
    state[WAY] = best if best < ways else PAST
    if not timed:
        return
    number = state[words + CALLS]
    state[words + CALLS] += 1
    turn, half = number - retried(number), 2 if count >= LONG else 1
    trial = TRIAL // half
    if number < trial * ways:
        state[WAY] = number // trial
        turn %= trial
    elif turn < trial:
        state[WAY] = (state[WAY] + 1 + state[words + TRIALS] % (ways - 1)) % ways
        state[words + TRIALS] += turn == trial - 1
    else:
        turn -= trial
    state[NOTED] = turn >= SETTLING // half
    state[WAY_WORDS], state[SIZE], state[BEGAN] = words, count, cycles()


@njit(nogil=True)
def filled(state):
    """Note in the first step how long it took to fill the slot, and show what the ways have cost this rank."""
    words = state[WAY_WORDS]
    if state[PLACE] > 0 or words == 0:
        return
    state[FILLING] = cycles() - state[BEGAN]
    most = (1 << BITS) // state[WORLD] - 1
    prices = 0
    for way in range(3):
        cost = state[words + COST + way]
        prices |= (min(cost, most) if cost > 0 else most) << (BITS * way)
    tell(state, PRICES, prices)


@njit(nogil=True)
def compare(state):
    """Add up what the headers of the first step say, once all ranks have come."""
    words = state[WAY_WORDS]
    if state[PLACE] > 0 or words == 0:
        return
    state[CAME] = cycles()
    total = 0
    for r in range(state[WORLD]):
        total += header_word(state, r, PRICES)
    best, least = PAST, 1 << BITS
    for way in range(3):
        cost = total >> (BITS * way) & ((1 << BITS) - 1)
        if cost < least:
            best, least = way, cost
    state[words + BEST] = best


@njit(nogil=True)
def meet(state, code, count, patience):
    """Wait for all ranks of a call that all make alike, and `compare`; MISMATCH where one is in another call."""
    if not all_came(state, state[STEP], 2 * state[STEP], patience):
        return WAITING
    if not agree(state, code, count):
        return MISMATCH
    compare(state)
    return DONE


@njit(nogil=True)
def end(state):
    """End a call, and note what it cost since all ranks had come, its filling included.

    A lower cost is taken at its word, a higher one with doubt: it may be another process's turn.
    """
    begin(state)
    if not state[NOTED]:
        return
    words = state[WAY_WORDS]
    word = words + COST + state[WAY]
    cost, known = (cycles() - state[CAME] + state[FILLING]) * 1024 // state[SIZE], state[word]
    if state[WAY] == THROUGH and 0 < state[words + MOVED] < TURN_BYTES:
        cost = int(cost * FRESH)
    if 0 < known < cost:
        cost = known + (min(cost, 2 * known) - known) // 8 + 1
    state[word] = max(1, cost)


@njit(nogil=True)
def ends(state, done, whole):
    """Leave a step that did so much of the whole; say whether the call has come to its end."""
    state[STEP] += 1
    state[PHASE] = state[PEER] = 0
    state[PLACE] += done
    if state[PLACE] < whole:
        return False
    end(state)
    return True
