"""Collectives that only move elements: one kernel for gathering, scattering, broadcasting and exchanging."""

from __future__ import annotations

from numba import carray, njit

from .memory import at, put, take
from .steps import (
    CODE,
    COUNT,
    DONE,
    LARGEST,
    MISMATCH,
    PEER,
    PHASE,
    PLACE,
    RANK,
    SLOT_BYTES,
    STEP,
    STUCK,
    WAITING,
    WORLD,
    all_came,
    begin,
    has_come,
    header_word,
    may_fill,
    publish,
    sizes_of,
    slot_of,
)
from .stores import show


@njit(nogil=True, cache=True)
def copy_own(state, sends, sent, receives, received, item):
    """Move what a rank sends to itself, by way of the memory behind its slot where both ends are strided."""
    rank = state[RANK]
    view = sends[rank if sends.shape[0] > 1 else 0]
    out = receives[rank if receives.shape[0] > 1 else 0]
    count = min(sent[rank, 1], received[rank, 1])
    here, there = view[0] + sent[rank, 0] * item, out[0] + received[rank, 0] * item
    if view[1] == 0 and out[1] == 0 and here == there:
        return
    if out[1] == 0:
        take(view, sent[rank, 0], count, there)
    elif view[1] == 0:
        put(out, received[rank, 0], count, here)
    else:
        slot = slot_of(state, rank, state[STEP]) + state[SLOT_BYTES]
        chunk = state[SLOT_BYTES] // (2 * item)
        for start in range(0, count, chunk):
            n = min(chunk, count - start)
            take(view, sent[rank, 0] + start, n, slot)
            put(out, received[rank, 0] + start, n, slot)


@njit(nogil=True, cache=True)
def fill(state, sends, sent, shared, piece, item):
    """Copy this step's elements for each other rank into the own slot."""
    rank, world, done = state[RANK], state[WORLD], state[PLACE]
    slot = slot_of(state, rank, state[STEP])
    room = piece // item
    if shared:
        n = min(room, sent[rank, 1] - done)
        if n > 0:
            show(state, sends[0], sent[rank, 0] + done, n, slot)
        return
    for to in range(world):
        n = min(room, sent[to, 1] - done)
        if to != rank and n > 0:
            view = sends[to if sends.shape[0] > 1 else 0]
            show(state, view, sent[to, 0] + done, n, slot + to * piece)


@njit(nogil=True, cache=True)
def fits(state, peer, count, shared, code):
    """Check that a rank is in the same call and sends what is expected of it."""
    sends = header_word(state, peer, COUNT)
    if not shared:
        table = carray(at(sizes_of(state, peer, state[STEP]), state), state[WORLD])
        sends = table[state[RANK]]
    if header_word(state, peer, CODE) == code and sends == count:
        return True
    state[STUCK] = peer
    return False


@njit(nogil=True, cache=True)
def exchange(state, sends, sent, receives, received, shared, meet, item, code, patience):
    """Move elements between ranks: `sent[r]` is the first element and their number for rank r, `received[r]` from it.

    Elements are counted in a view for each rank, or in a single one. `shared`: all ranks get the same elements,
    which then stand once in the slot; the own row says which. `meet`: wait for every rank, and go on for as many
    steps as the largest of all runs needs; otherwise a rank knows from its own runs how many steps there are,
    and waits only for those who send to it.
    """
    rank, world = state[RANK], state[WORLD]
    piece = state[SLOT_BYTES] if shared else (state[SLOT_BYTES] // world) // 64 * 64
    room = piece // item
    while True:
        step, done = state[STEP], state[PLACE]
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            largest = 0
            table = carray(at(sizes_of(state, rank, step), state), world)
            for r in range(world):
                largest = max(largest, sent[r, 1], received[r, 1])
                table[r] = sent[r, 1]
            fill(state, sends, sent, shared, piece, item)
            publish(state, code, sent[rank, 1], largest)
            if done == 0:  # while the others come
                copy_own(state, sends, sent, receives, received, item)
            state[PHASE] = 1
        if state[PHASE] == 1 and meet and not all_came(state, step, 2 * step, patience):
            return WAITING
        state[PHASE] = 2
        most = header_word(state, rank, LARGEST)
        while state[PEER] < world:
            peer = state[PEER]
            n = min(room, received[peer, 1] - done)
            if peer != rank and (n > 0 or meet):
                if not has_come(state, peer, step, 2 * step, patience):
                    return WAITING
                if not fits(state, peer, received[peer, 1], shared, code):
                    return MISMATCH
                if n > 0:
                    out = receives[peer if receives.shape[0] > 1 else 0]
                    at_peer = slot_of(state, peer, step)
                    put(out, received[peer, 0] + done, n, at_peer + (0 if shared else rank * piece))
            state[PEER] += 1
        if meet:
            for r in range(world):
                most = max(most, header_word(state, r, LARGEST))
        state[STEP] += 1
        state[PHASE] = state[PEER] = 0
        state[PLACE] += room
        if state[PLACE] >= most:
            begin(state)
            return DONE


# inlines memory.py and steps.py and stores.py 0c1302bf
