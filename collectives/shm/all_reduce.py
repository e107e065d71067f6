"""All-reduce over the ranks of a group: every element in rank order, so all ranks get the same bits."""

from __future__ import annotations

import numpy as np
from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .fold import BLOCK, fold
from .memory import VIEW_WORDS, at, put, store
from .places import place_with_results, results_of, shown_by
from .steps import (
    CHUNK_BYTES,
    DONE,
    FIRST_INPUT,
    LARGEST,
    MISMATCH,
    PEER,
    PHASE,
    PLACE,
    RANK,
    SCRATCH,
    STEP,
    STUCK,
    WAITING,
    WAY,
    WORLD,
    agree,
    all_came,
    has_come,
    header_word,
    line_of,
    may_fill,
    publish,
    slot_of,
)
from .stores import PAST, give, show
from .ways import REDUCE, SYMMETRIC, choose, compare, end, ends, filled, meet

ONE_SHOT = 16 << 10  # up to these bytes every rank reduces everything
# words of a reduction that is written down (noted.py), and the view of what is reduced
FUNCTION, ELEMENTS, OPERATOR, OF = range(4)
_WORDS = np.empty(0, np.int64)


@njit(nogil=True)
def part_of(count, ranks, rank, item):
    """Split elements over ranks in runs of whole cache lines: first element and number."""
    grain = max(1, 64 // item)
    run = -(-count // (ranks * grain)) * grain
    first = min(rank * run, count)
    return first, min(run, count - first)


@njit(nogil=True)
def show_parts(state, view, done, n):
    """Show what others read of this step's elements: all, or (each reduces its part) all but the own part."""
    rank, item = state[RANK], view[2]
    first, run = part_of(n, state[WORLD], rank, item)
    place_with_results(state, n * item, run * item)
    slot = shown_by(state, rank)
    if n * item <= ONE_SHOT or view[1] > 0:
        show(state, view, done, n, slot)
        return
    after = first + run
    show(state, view, done, first, slot)
    show(state, view, done + after, n - after, slot + after * item)


@njit(nogil=True)
def fold_own(state, result, first, run, function, op, view, done, keep):
    """Reduce the own part, show it as `result` and bring it home, each block while it is in the first cache."""
    item = view[2]
    for start in range(0, run, BLOCK):
        n = min(BLOCK, run - start)
        place = result + start * item
        past = state[WAY] == PAST  # what reduces stores in the ordinary way only
        block = state[SCRATCH] + BLOCK * 8 if past else place
        fold(state, block, first + start, n, function, op)
        if past:
            give(state, place, block, n * item)
        if keep:
            put(view, done + first + start, n, block)


@njit(nogil=True, forceinline=True)
def reduce_chunk(state, view, function, op, done, n, keep):
    """Reduce this step's elements; of more than ONE_SHOT bytes the own part, after which the others' are awaited."""
    rank, world, item = state[RANK], state[WORLD], view[2]
    for r in range(world):
        state[FIRST_INPUT + r] = shown_by(state, r)
    result = results_of(state, rank)
    if n * item > ONE_SHOT:
        if view[1] == 0:
            state[FIRST_INPUT + rank] = view[0] + done * item
        first, run = part_of(n, world, rank, item)
        fold_own(state, result, first, run, function, op, view, done, keep)
        store(line_of(state, rank, state[STEP]), 2 * state[STEP] + 1)
        state[PHASE] = 2
    elif keep and view[1] == 0:
        fold(state, view[0] + done * item, 0, n, function, op)
    elif keep:
        fold(state, result, 0, n, function, op)
        put(view, done, n, result)


@njit(nogil=True, forceinline=True)
def take_results(state, view, done, n, patience):
    """Bring home what the others have made of their parts of this step; say whether all have come."""
    step = state[STEP]
    while state[PEER] < state[WORLD]:
        peer = state[PEER]
        if peer != state[RANK]:
            if not has_come(state, peer, step, 2 * step + 1, patience):
                return False
            first, run = part_of(n, state[WORLD], peer, view[2])
            put(view, done + first, run, results_of(state, peer))
        state[PEER] += 1
    return True


@njit(nogil=True, forceinline=True)
def all_reduce(state, view, function, count, op, root, code, patience):
    """Reduce a tensor over the ranks, in place; on the root only, unless that is -1.

    One step a chunk. Up to ONE_SHOT bytes each rank reduces all slots by itself (one crossing); beyond,
    each reduces its part and copies the others' results.
    """
    item, keep = view[2], root < 0 or root == state[RANK]
    while True:
        done = state[PLACE]
        n = min(state[CHUNK_BYTES] // item, count - done)
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            choose(state, REDUCE, count * item, 2, True)
            show_parts(state, view, done, n)
            filled(state)
            publish(state, code, count, 0)
            state[PHASE] = 1
        if state[PHASE] == 1:
            status = meet(state, code, count, patience)
            if status != DONE:
                return status
            reduce_chunk(state, view, function, op, done, n, keep)
        if state[PHASE] == 2 and keep and not take_results(state, view, done, n, patience):
            return WAITING
        if ends(state, n, count):
            return DONE


@njit(nogil=True)
def all_reduce_dense(state_at, words_at, code, patience):
    """Do an `all_reduce` for all ranks whose arguments `dense_reduction` has written down."""
    state, words = carray(at(state_at, _WORDS), FIRST_INPUT), carray(at(words_at, _WORDS), OF)
    view = carray(at(words_at + 8 * OF, _WORDS), VIEW_WORDS)
    function, count, op = words[FUNCTION], words[ELEMENTS], words[OPERATOR]
    return all_reduce(state, view, function, count, op, -1, code, patience)


@njit(nogil=True)
def all_reduce_symmetric(state, bases, offset, item, function, count, op, code, patience):
    """Reduce tensors that lie at one offset of every rank's shared memory, where they lie.

    Each rank reduces its part of all tensors and writes it into all of them: no copy in, none out.
    """
    rank, world = state[RANK], state[WORLD]
    step = state[STEP]
    if state[PHASE] == 0:
        if not may_fill(state, patience):
            return WAITING
        choose(state, SYMMETRIC, count * item, 2, True)
        filled(state)
        publish(state, code, count, offset)
        state[PHASE] = 1
    if state[PHASE] == 1:
        if not all_came(state, step, 2 * step, patience):
            return WAITING
        for r in range(world):
            state[FIRST_INPUT + r] = bases[r] + offset
            if header_word(state, r, LARGEST) != offset:
                state[STUCK] = r
                return MISMATCH
        if not agree(state, code, count):
            return MISMATCH
        compare(state)
        first, run = part_of(count, world, rank, item)
        result = slot_of(state, rank, step)
        for start in range(first, first + run, BLOCK):
            n = min(BLOCK, first + run - start)
            fold(state, result, start, n, function, op)
            for r in range(world):
                give(state, state[FIRST_INPUT + r] + start * item, result, n * item)
        store(line_of(state, rank, step), 2 * step + 1)
        state[PHASE] = 2
    if not all_came(state, step, 2 * step + 1, patience):
        return WAITING
    state[STEP] += 1
    end(state)
    return DONE
