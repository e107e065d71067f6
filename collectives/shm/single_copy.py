"""One copy instead of two: a rank reads what it is sent where it lies, in the other process's own memory.

The system call (process_vm_readv) costs the kernel something for each page, and takes nothing from another processor's
cache but what it reads; two copies by way of a slot cost two processors a copy each. Which is cheaper ways.py finds
out. A rank whose elements others may not read copies them all the same: the header says where they are. Who sent the
one way leaves the call when all have read.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import carray, types

from ...cuda_kernels.kernel_cache import njit
from .memory import at, store
from .steps import (
    FIRST_INPUT,
    NOTED,
    OFFERS,
    PEER,
    PHASE,
    PIECES,
    RANK,
    SHOWN,
    SINGLE,
    STEP,
    WAY,
    WORLD,
    all_came,
    header_word,
    line_of,
    slot_of,
)
from .stores import PAST
from .ways import EXCHANGE, ONE, choose

LEAST = 128 << 10  # bytes for a rank that are worth a system call
IN_PLACE = -1  # of header word SHOWN: addresses stand in the slot
# of state[SINGLE]; CARELESS, which does not wait for readers, is for tests
NEVER, BY_COST, ALWAYS, CARELESS = range(4)

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


@njit(nogil=True)
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


@njit(nogil=True)
def choose_copies(state, count, meet):
    """Choose the way of an exchange of so many bytes to each rank; say whether it is one copy."""
    mode = state[SINGLE] if meet and count >= LEAST else NEVER
    choose(state, EXCHANGE, count, 3 if mode == BY_COST else 2, meet)
    if mode in (ALWAYS, CARELESS):
        state[WAY], state[NOTED] = ONE, 0
    return state[WAY] == ONE


@njit(nogil=True)
def offer(state, sends, sent, receives, received, shared, item):
    """Put the addresses of what this rank sends into its slot, if others may read there; else it is copied twice."""
    state[OFFERS] = may_be_read(state, sends, sent, receives, received, shared, item)
    if not state[OFFERS]:
        state[WAY], state[NOTED] = PAST, 0
        return
    rank, world = state[RANK], state[WORLD]
    addresses = carray(at(slot_of(state, rank, state[STEP]), state), world)
    for to in range(world):
        view = sends[to if sends.shape[0] > 1 else 0]
        addresses[to] = view[0] + sent[rank if shared else to, 0] * item


@njit(nogil=True, forceinline=True)
def all_read(state, patience):
    """Tell those who sent the one way, if any did, that this rank has read; one of these waits until all have."""
    step, offered = state[STEP], False
    for r in range(state[WORLD]):
        offered |= header_word(state, r, SHOWN) == IN_PLACE
    if not offered:
        return True
    if state[PHASE] == 2:
        store(line_of(state, state[RANK], step), 2 * step + 1)
        state[PEER] = 0
        state[PHASE] = 3
    careful = state[OFFERS] and state[SINGLE] != CARELESS
    return not careful or all_came(state, step, 2 * step + 1, patience)


@njit(nogil=True)
def readable(state, first, last):
    """Say whether the system lets processes read memory between two addresses (of devices it does not)."""
    pieces = state.ctypes.data + 8 * PIECES
    pid = state[FIRST_INPUT + state[WORLD] + state[RANK]]
    state[PIECES], state[PIECES + 1] = pieces + 48, 2
    state[PIECES + 2], state[PIECES + 3] = first, 1
    state[PIECES + 4], state[PIECES + 5] = last, 1
    return process_vm_readv(pid, pieces, 1, pieces + 16, 2, 0) == 2


@njit(nogil=True)
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
