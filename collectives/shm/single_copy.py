"""One copy instead of two: a rank reads what it is sent where it lies, in the other process's own memory.

The system call (process_vm_readv) costs the kernel something for each page, and takes nothing from another processor's
cache but what it reads; two copies by way of a slot cost two processors a copy each, and more where the lines of a
slot must be taken from its readers (see stores.py). Which is cheaper depends on the machine, its mode of the minute and
the size, so each rank notes what its calls cost a KB, by sizes, and shows in the headers of its calls which way was
cheaper of late; all ranks add these up and take one way in the next call, for to mix them is the worst. A rank whose
elements others may not read copies them all the same: the header says where they are. Who sent the one way leaves the
call when all have read.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import carray, njit, types

from .memory import at
from .steps import (
    BALANCE,
    BEGAN,
    COSTS,
    FILLING,
    FIRST_INPUT,
    OFFERS,
    PIECES,
    RANK,
    SINGLE,
    WORLD,
    header_word,
)
from .stores import cycles

LEAST = 128 << 10  # bytes for a rank that are worth a system call
CLASSES = 8  # of sizes, each twice the one before; the last one has no end
# words of a class: how often it was chosen in, cycles for a KB by either way, and what all ranks hold to be cheaper
CALLS, TWO, ONE, AGREED = range(4)
TRIALS = 8  # the first calls of a class try both ways in turn,
RETRY = 64  # and then one of so many the dearer one
NEVER, BY_COST, ALWAYS, CARELESS = range(
    4
)  # of state[SINGLE]; CARELESS, which does not wait for readers, is for tests

process_vm_readv: Any = types.ExternalFunction(
    "process_vm_readv",
    types.intp(types.int32, types.intp, types.uintp, types.intp, types.uintp, types.uintp),
)


def can_read(pid: int, address: int, word: int) -> bool:
    """Say whether this process may read the word that stands in another's memory; a sandbox may withhold it."""
    found = ctypes.c_int64(0)
    pieces = [(ctypes.c_uint64 * 2)(a, 8) for a in (ctypes.addressof(found), address)]
    call = ctypes.CDLL(None).process_vm_readv
    n = call(pid, pieces[0], ctypes.c_ulong(1), pieces[1], ctypes.c_ulong(1), ctypes.c_ulong(0))
    return n == 8 and found.value == word


@njit(nogil=True, cache=True)
def read_there(state, rank, here, there, count):
    """Copy bytes out of the memory of a rank's process; say whether all have come."""
    pid = state[FIRST_INPUT + state[WORLD] + rank]
    pieces = state.ctypes.data + 8 * PIECES
    done = 0
    while done < count:
        state[PIECES] = here + done
        state[PIECES + 2] = there + done
        state[PIECES + 1] = state[PIECES + 3] = count - done
        n = process_vm_readv(pid, pieces, 1, pieces + 16, 1, 0)
        if n <= 0:
            return False
        done += n
    return True


@njit(nogil=True, cache=True)
def words_of(count):
    """Find the words of the class of a number of bytes."""
    number = 0
    while number < CLASSES - 1 and count >= LEAST << (number + 1):
        number += 1
    return COSTS + 4 * number


@njit(nogil=True, cache=True)
def note(state, count):
    """Take note of what a call cost since all ranks had come, its filling included.

    A mean of late calls; of one that was interrupted but a part.
    """
    if count < LEAST:
        return
    word = words_of(count) + (ONE if state[OFFERS] else TWO)
    cost, known = (cycles() - state[BEGAN] + state[FILLING]) * 1024 // count, state[word]
    if known > 0:
        cost = known + (min(cost, 4 * known) - known) // 4
    state[word] = max(1, cost)


@njit(nogil=True, cache=True)
def pays(state, count):
    """Choose a way for so many bytes to each rank; to be asked once a call."""
    if count < LEAST or state[SINGLE] != BY_COST:
        return count >= LEAST and state[SINGLE] != NEVER
    words = words_of(count)
    state[words + CALLS] += 1
    number = state[words + CALLS]
    if number <= TRIALS:
        return number % 2 == 0
    return (state[words + AGREED] > 0) ^ (number % RETRY == 0)


@njit(nogil=True, cache=True)
def balance(state, count):
    """Say by how much one copy was cheaper to this rank than two, for so many bytes to each rank."""
    words = words_of(count)
    return state[words + TWO] - state[words + ONE] if count >= LEAST else 0


@njit(nogil=True, cache=True)
def agree_on(state, count):
    """Add up what the headers of this step say."""
    if count >= LEAST:
        total = 0
        for r in range(state[WORLD]):
            total += header_word(state, r, BALANCE)
        state[words_of(count) + AGREED] = total


@njit(nogil=True, cache=True)
def readable(state, first, last):
    """Say whether the system lets processes read memory between two addresses (of devices it does not)."""
    pieces = state.ctypes.data + 8 * PIECES
    pid = state[FIRST_INPUT + state[WORLD] + state[RANK]]
    state[PIECES], state[PIECES + 1] = pieces + 48, 2
    state[PIECES + 2], state[PIECES + 3] = first, 1
    state[PIECES + 4], state[PIECES + 5] = last, 1
    return process_vm_readv(pid, pieces, 1, pieces + 16, 2, 0) == 2


@njit(nogil=True, cache=True)
def may_be_read(state, sends, sent, receives, received, shared, item):
    """Say whether others may read what this rank sends: it is dense, and nothing is received into it."""
    rank, world = state[RANK], state[WORLD]
    low, high = np.int64(1) << 62, 0
    for to in range(world):
        of = rank if shared else to
        if to != rank and sent[of, 1] > 0:
            view = sends[to if sends.shape[0] > 1 else 0]
            if view[1] > 0:
                return False
            begin = view[0] + sent[of, 0] * item
            low, high = min(low, begin), max(high, begin + sent[of, 1] * item)
    for r in range(world):
        out = receives[r if receives.shape[0] > 1 else 0]
        begin = out[0] + received[r, 0] * item
        meets = out[1] > 0 or (begin < high and low < begin + received[r, 1] * item)
        if r != rank and received[r, 1] > 0 and meets:
            return False
    return low < high and readable(state, low, high - 1)


@njit(nogil=True, cache=True)
def offer(state, sends, sent, shared, item, slot):
    """Put the addresses of what this rank sends into its slot."""
    rank, world = state[RANK], state[WORLD]
    addresses = carray(at(slot, state), world)
    for to in range(world):
        view = sends[to if sends.shape[0] > 1 else 0]
        addresses[to] = view[0] + sent[rank if shared else to, 0] * item


# inlines memory.py and steps.py and stores.py b12b07bd
