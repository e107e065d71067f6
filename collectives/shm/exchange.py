"""Collectives that only move elements: one kernel for gathering, scattering, broadcasting and exchanging."""

from __future__ import annotations

import numpy as np
from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .memory import VIEW_WORDS, at, put
from .outgoing import copy_own, give_out, turn_of, whole_of
from .places import shown_by, shown_to
from .single_copy import IN_PLACE, all_read, read_there
from .steps import (
    CODE,
    COUNT,
    DONE,
    FIRST_INPUT,
    KEPT,
    LARGEST,
    MISMATCH,
    PEER,
    PHASE,
    PLACE,
    RANK,
    SENT,
    SHOWN,
    SLOT_BYTES,
    STEP,
    STUCK,
    WAITING,
    WORLD,
    all_came,
    has_come,
    header_word,
    may_fill,
    slot_of,
)
from .stores import settle
from .ways import compare, ends

# words of an exchange of even runs: two views, and the tables behind them
SHARED, ITEM, SENDS, RECEIVES = 0, 1, 2, 2 + VIEW_WORDS
TABLE = RECEIVES + VIEW_WORDS
_WORDS = np.empty(0, np.int64)


@njit(nogil=True, forceinline=True)
def fits(state, peer, count, shared, code):
    """Check that a rank is in the same call and sends what is expected of it."""
    sends = header_word(state, peer, COUNT)
    if not shared:
        sends = header_word(state, peer, SENT + state[RANK])
    if header_word(state, peer, CODE) == code and sends == count:
        return True
    state[STUCK] = peer
    return False


@njit(nogil=True, forceinline=True)
def bring(state, peer, receives, received, shared, piece, item):
    """Take this step's elements of a rank from its slot, or all from its own memory; say whether it could."""
    rank, done, count = state[RANK], state[PLACE], received[peer, 1]
    out = receives[peer if receives.shape[0] > 1 else 0]
    if header_word(state, peer, SHOWN) != IN_PLACE:
        n = min(turn_of(state, piece, item), count - done)
        if n > 0:
            there = shown_by(state, peer) if shared else shown_to(state, peer, rank)
            settle(out, received[peer, 0] + done, n, there, whole_of(received, item))
        return True
    if done > 0 or count == 0:
        return True
    there = carray(at(slot_of(state, peer, state[STEP]), state), state[WORLD])[rank]
    if out[1] > 0:
        return land(state, peer, there, out, received[peer, 0], count)
    return read_there(state, peer, out[0] + received[peer, 0] * item, there, count * item)


@njit(nogil=True)
def land(state, peer, there, out, first, count):
    """Bring elements of a rank's own memory into a strided view, by way of the memory behind the own slot."""
    room, item = state[SLOT_BYTES] // 2, out[2]
    behind = slot_of(state, state[RANK], state[STEP]) + state[SLOT_BYTES]
    for start in range(0, count, room // item):
        n = min(room // item, count - start)
        if not read_there(state, peer, behind, there + start * item, n * item):
            return False
        put(out, first + start, n, behind)
    return True


@njit(nogil=True, forceinline=True)
def bring_all(state, receives, received, shared, meet, piece, item, code, patience):
    """Take this step's elements of every other rank: DONE, WAITING, or MISMATCH."""
    step, done = state[STEP], state[PLACE]
    while state[PEER] < state[WORLD]:
        peer = state[PEER]
        if peer != state[RANK] and (received[peer, 1] > done or meet):
            if not has_come(state, peer, step, 2 * step, patience):
                return WAITING
            if not fits(state, peer, received[peer, 1], shared, code):
                return MISMATCH
            if not bring(state, peer, receives, received, shared, piece, item):
                state[STUCK] = peer
                return WAITING
        state[PEER] += 1
    return DONE


@njit(nogil=True, forceinline=True)
def most_of(state, meet):
    """Find the longest run of all ranks; of this one, if it does not `meet` the others."""
    most = header_word(state, state[RANK], LARGEST)
    if meet:
        for r in range(state[WORLD]):
            most = max(most, header_word(state, r, LARGEST))
    return most


@njit(nogil=True, forceinline=True)
def exchange(state, sends, sent, receives, received, shared, meet, item, code, patience):
    """Move elements between ranks: `sent[r]` is the first element and their number for rank r, `received[r]` from it.

    Elements are counted in a view for each rank, or in a single one. `shared`: all ranks get the same elements,
    which then stand once in the slot; the own row says which. `meet`: wait for every rank, and go on for as many
    steps as the largest of all runs needs; otherwise a rank knows from its own runs how many steps there are,
    and waits only for those who send to it.
    """
    piece = state[SLOT_BYTES] if shared else (state[SLOT_BYTES] // state[WORLD]) // 64 * 64
    while True:
        step = state[STEP]
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            give_out(state, sends, sent, receives, received, shared, meet, piece, item, code)
            if state[PLACE] == 0 and not state[KEPT]:  # while the others come
                copy_own(state, sends, sent, receives, received, item)
            state[PHASE] = 1
        if state[PHASE] == 1:
            if meet and not all_came(state, step, 2 * step, patience):
                return WAITING
            if meet:
                compare(state)
            state[PHASE] = 2
        if state[PHASE] == 2:
            status = bring_all(state, receives, received, shared, meet, piece, item, code, patience)
            if status != DONE:
                return status
        if meet and not all_read(state, patience):
            return WAITING
        if ends(state, turn_of(state, piece, item), most_of(state, meet)):
            return DONE


@njit(nogil=True)
def exchange_evenly(state_at, words_at, code, patience):
    """Do an `exchange` whose arguments `even_exchange` has written down: addresses cost less to pass than arrays."""
    state, words = carray(at(state_at, _WORDS), FIRST_INPUT), carray(at(words_at, _WORDS), TABLE)
    world, tables = state[WORLD], words_at + 8 * TABLE
    sends = carray(at(words_at + 8 * SENDS, _WORDS), (1, VIEW_WORDS))
    receives = carray(at(words_at + 8 * RECEIVES, _WORDS), (1, VIEW_WORDS))
    sent = carray(at(tables, _WORDS), (world, 2))
    received = carray(at(tables + 16 * world, _WORDS), (world, 2))
    shared, item = words[SHARED], words[ITEM]
    return exchange(state, sends, sent, receives, received, shared, 1, item, code, patience)
