"""Collectives that only move elements: one kernel for gathering, scattering, broadcasting and exchanging."""

from __future__ import annotations

import numpy as np
from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .memory import VIEW_WORDS, at, put, store, take
from .places import pages, place, shown_by, shown_to
from .single_copy import CARELESS, choose_copies, offer, read_there
from .steps import (
    CODE,
    COUNT,
    DONE,
    FIRST_INPUT,
    KEPT,
    LARGEST,
    MISMATCH,
    OFFERS,
    PEER,
    PHASE,
    PLACE,
    RANK,
    SENT,
    SHOWN,
    SINGLE,
    SLOT_BYTES,
    STEP,
    STUCK,
    WAITING,
    WAY,
    WORLD,
    all_came,
    has_come,
    header_word,
    line_of,
    may_fill,
    publish,
    slot_of,
    tell,
)
from .stores import BEYOND, PAST, copy_past_and_home, settle, show
from .ways import compare, end, filled

# bytes for a rank in the first step of a call, and in the next
FIRST_TURN, NEXT_TURN = 512 << 10, 256 << 10
IN_PLACE = -1  # of header word SHOWN: addresses stand in the slot
# words of an exchange of even runs: two views, and the tables behind them
SHARED, ITEM, SENDS, RECEIVES = 0, 1, 2, 2 + VIEW_WORDS
TABLE = RECEIVES + VIEW_WORDS
_WORDS = np.empty(0, np.int64)


@njit(nogil=True, forceinline=True)
def whole_of(received, item):
    """Count the bytes that a call brings this rank."""
    elements = 0
    for r in range(received.shape[0]):
        elements += received[r, 1]
    return elements * item


@njit(nogil=True, forceinline=True)
def largest_of(sent, received):
    """Find the longest run of this rank."""
    largest = 0
    for r in range(sent.shape[0]):
        largest = max(largest, sent[r, 1], received[r, 1])
    return largest


@njit(nogil=True, forceinline=True)
def turn_of(state, piece, item):
    """Count the elements for a rank in this step: first a large turn, then such as stay in the second cache."""
    return min(piece, FIRST_TURN if state[PLACE] == 0 else NEXT_TURN) // item


@njit(nogil=True, forceinline=True)
def copy_own(state, sends, sent, receives, received, item):
    """Move what a rank sends to itself, by way of the memory behind its slot where both ends are strided."""
    rank = state[RANK]
    view = sends[rank if sends.shape[0] > 1 else 0]
    out = receives[rank if receives.shape[0] > 1 else 0]
    count = min(sent[rank, 1], received[rank, 1])
    here, there = view[0] + sent[rank, 0] * item, out[0] + received[rank, 0] * item
    if view[1] == 0 and out[1] == 0 and here == there:
        return
    if view[1] == 0:
        settle(out, received[rank, 0], count, here, whole_of(received, item))
    elif out[1] == 0:
        take(view, sent[rank, 0], count, there)
    else:
        slot = slot_of(state, rank, state[STEP]) + state[SLOT_BYTES]
        chunk = state[SLOT_BYTES] // (2 * item)
        for start in range(0, count, chunk):
            n = min(chunk, count - start)
            take(view, sent[rank, 0] + start, n, slot)
            put(out, received[rank, 0] + start, n, slot)


@njit(nogil=True, forceinline=True)
def keeps(state, sends, sent, receives, received, shared, item):
    """Say whether what a rank shows is kept by it too, and can be copied to both places while it is read once."""
    rank = state[RANK]
    out, count = receives[rank if receives.shape[0] > 1 else 0], sent[rank, 1]
    if not shared or state[WAY] != PAST or sends[0, 1] or out[1] or received[rank, 1] != count:
        return False
    here, there = sends[0, 0] + sent[rank, 0] * item, out[0] + received[rank, 0] * item
    return whole_of(received, item) < BEYOND and abs(here - there) >= count * item


@njit(nogil=True, forceinline=True)
def fill(state, sends, sent, receives, received, shared, piece, item):
    """Copy this step's elements for each other rank into the own slot; and home, if the call `keeps` them."""
    rank, world, done = state[RANK], state[WORLD], state[PLACE]
    room = turn_of(state, piece, item)
    if shared:
        slot = shown_by(state, rank)
        n = min(room, sent[rank, 1] - done)
        if n > 0 and state[KEPT]:
            out = receives[rank if receives.shape[0] > 1 else 0]
            here, there = sent[rank, 0] + done, received[rank, 0] + done
            copy_past_and_home(slot, out[0] + there * item, sends[0, 0] + here * item, n * item)
        elif n > 0:
            show(state, sends[0], sent[rank, 0] + done, n, slot)
        return
    for to in range(world):
        n = min(room, sent[to, 1] - done)
        if to != rank and n > 0:
            view = sends[to if sends.shape[0] > 1 else 0]
            show(state, view, sent[to, 0] + done, n, shown_to(state, rank, to))


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
def give_out(state, sends, sent, receives, received, shared, meet, piece, item, code):
    """Fill the slot of this step, or (once for a call) show in it where the elements lie; then publish it."""
    rank, world, step = state[RANK], state[WORLD], state[STEP]
    largest = largest_of(sent, received)
    for r in range(world):
        tell(state, SENT + r, sent[r, 1])
    if state[PLACE] == 0:
        state[OFFERS] = state[KEPT] = 0
        if choose_copies(state, largest * item, meet):
            offer(state, sends, sent, receives, received, shared, item, slot_of(state, rank, step))
        if not state[OFFERS]:
            state[KEPT] = keeps(state, sends, sent, receives, received, shared, item)
    if state[OFFERS]:
        largest = 0  # the others say how many steps their elements need
        tell(state, SHOWN, IN_PLACE)
    else:
        step_bytes = min(turn_of(state, piece, item), max(0, largest - state[PLACE])) * item
        span = min(pages(step_bytes), piece)
        place(state, step_bytes if shared else (world - 1) * span, span, 0)
        fill(state, sends, sent, receives, received, shared, piece, item)
    filled(state)
    publish(state, code, sent[rank, 1], largest)


@njit(nogil=True, forceinline=True)
def exchange(state, sends, sent, receives, received, shared, meet, item, code, patience):
    """Move elements between ranks: `sent[r]` is the first element and their number for rank r, `received[r]` from it.

    Elements are counted in a view for each rank, or in a single one. `shared`: all ranks get the same elements,
    which then stand once in the slot; the own row says which. `meet`: wait for every rank, and go on for as many
    steps as the largest of all runs needs; otherwise a rank knows from its own runs how many steps there are,
    and waits only for those who send to it.
    """
    rank, world = state[RANK], state[WORLD]
    piece = state[SLOT_BYTES] if shared else (state[SLOT_BYTES] // world) // 64 * 64
    while True:
        step, done = state[STEP], state[PLACE]
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            give_out(state, sends, sent, receives, received, shared, meet, piece, item, code)
            if done == 0 and not state[KEPT]:  # while the others come
                copy_own(state, sends, sent, receives, received, item)
            state[PHASE] = 1
        if state[PHASE] == 1:
            if meet and not all_came(state, step, 2 * step, patience):
                return WAITING
            if meet:
                compare(state)
            state[PHASE] = 2
        while state[PHASE] == 2 and state[PEER] < world:
            peer = state[PEER]
            if peer != rank and (received[peer, 1] > done or meet):
                if not has_come(state, peer, step, 2 * step, patience):
                    return WAITING
                if not fits(state, peer, received[peer, 1], shared, code):
                    return MISMATCH
                if not bring(state, peer, receives, received, shared, piece, item):
                    state[STUCK] = peer
                    return WAITING
            state[PEER] += 1
        most, offered = header_word(state, rank, LARGEST), False
        if meet:
            for r in range(world):
                most = max(most, header_word(state, r, LARGEST))
                offered |= header_word(state, r, SHOWN) == IN_PLACE
        if offered and state[PHASE] == 2:
            store(line_of(state, rank, step), 2 * step + 1)
            state[PEER] = 0
            state[PHASE] = 3
        waits = state[PHASE] == 3 and state[OFFERS] and state[SINGLE] != CARELESS
        if waits and not all_came(state, step, 2 * step + 1, patience):  # until all have read
            return WAITING
        state[STEP] += 1
        state[PHASE] = state[PEER] = 0
        state[PLACE] += turn_of(state, piece, item)
        if state[PLACE] >= most:
            end(state)
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
