"""Reductions over the ranks of a group: every element in rank order, so all ranks get the same bits."""

from __future__ import annotations

import numpy as np
from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .fold import BLOCK
from .memory import VIEW_WORDS, at, call_fold, put, store
from .places import pages, place, place_with_results, results_of, shown_by, shown_to
from .steps import (
    CHUNK_BYTES,
    DONE,
    FIRST_INPUT,
    INPUTS,
    LARGEST,
    MISMATCH,
    PEER,
    PHASE,
    PLACE,
    RANK,
    SCRATCH,
    SLOT_BYTES,
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
from .ways import REDUCE, SCATTER, SYMMETRIC, choose, compare, end, filled

ONE_SHOT = 16 << 10  # up to these bytes every rank reduces everything
# words of a reduction that is written down (noted.py): a view, and of a reduce-scatter another, and where runs begin
FUNCTION, ELEMENTS, OPERATOR, OF = range(4)
TO = OF + VIEW_WORDS
STARTS = TO + VIEW_WORDS
_WORDS = np.empty(0, np.int64)


@njit(nogil=True)
def fold(state, out, first, count, function, op):
    """Reduce elements of the memory at the ranks' inputs into `out`."""
    call_fold(function, out, state[INPUTS], state[WORLD], first, count, op, state[SCRATCH])


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


@njit(nogil=True, forceinline=True)
def all_reduce(state, view, function, count, op, root, code, patience):
    """Reduce a tensor over the ranks, in place; on the root only, unless that is -1.

    One step a chunk. Up to ONE_SHOT bytes each rank reduces all slots by itself (one crossing); beyond,
    each reduces its part and copies the others' results.
    """
    rank, world, item = state[RANK], state[WORLD], view[2]
    keep = root < 0 or root == rank
    while True:
        step, done = state[STEP], state[PLACE]
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
            if not all_came(state, step, 2 * step, patience):
                return WAITING
            if not agree(state, code, count):
                return MISMATCH
            compare(state)
            for r in range(world):
                state[FIRST_INPUT + r] = shown_by(state, r)
            if n * item > ONE_SHOT and view[1] == 0:
                state[FIRST_INPUT + rank] = view[0] + done * item
            result = results_of(state, rank)
            if n * item > ONE_SHOT:
                first, run = part_of(n, world, rank, item)
                fold_own(state, result, first, run, function, op, view, done, keep)
                store(line_of(state, rank, step), 2 * step + 1)
                state[PHASE] = 2
            elif keep and view[1] == 0:
                fold(state, view[0] + done * item, 0, n, function, op)
            elif keep:
                fold(state, result, 0, n, function, op)
                put(view, done, n, result)
        if state[PHASE] == 2:
            while keep and state[PEER] < world:
                peer = state[PEER]
                if peer != rank:
                    if not has_come(state, peer, step, 2 * step + 1, patience):
                        return WAITING
                    first, run = part_of(n, world, peer, item)
                    put(view, done + first, run, results_of(state, peer))
                state[PEER] += 1
        state[STEP] += 1
        state[PHASE] = state[PEER] = 0
        state[PLACE] += n
        if state[PLACE] >= count:
            end(state)
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


@njit(nogil=True, forceinline=True)
def reduce_scatter(state, views, starts, out, function, count, op, code, patience):
    """Reduce `count` elements for each rank: those that `starts` shows in a view, or in one for each rank.

    A slot is cut into a piece for each rank; one step moves as many elements as a piece holds. The own part is read
    where it lies, if it is dense and `out` is not a part of it.
    """
    rank, world, item = state[RANK], state[WORLD], out[2]
    piece = (state[SLOT_BYTES] // world) // 64 * 64
    own = views[rank if views.shape[0] > 1 else 0]
    home = own[0] + starts[rank] * item
    apart = out[0] + count * item <= home or home + count * item <= out[0]
    stays = own[1] == 0 and out[1] == 0 and apart
    while True:
        step, done = state[STEP], state[PLACE]
        n = min(piece // item, count - done)
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            choose(state, SCATTER, count * item, 2, True)
            span = min(pages(n * item), piece)
            place(state, (world - stays) * span, span, 0)
            for r in range(world):
                if r != rank or not stays:
                    view = views[r if views.shape[0] > 1 else 0]
                    show(state, view, starts[r] + done, n, shown_to(state, rank, r))
            filled(state)
            publish(state, code, count, 0)
            state[PHASE] = 1
        if not all_came(state, step, 2 * step, patience):
            return WAITING
        if not agree(state, code, count):
            return MISMATCH
        compare(state)
        for r in range(world):
            state[FIRST_INPUT + r] = shown_to(state, r, rank)
        if stays:
            state[FIRST_INPUT + rank] = home + done * item
        if out[1] == 0:
            fold(state, out[0] + done * item, 0, n, function, op)
        else:
            result = slot_of(state, rank, step) + state[SLOT_BYTES]
            fold(state, result, 0, n, function, op)
            put(out, done, n, result)
        state[STEP] += 1
        state[PHASE] = 0
        state[PLACE] += n
        if state[PLACE] >= count:
            end(state)
            return DONE


@njit(nogil=True)
def reduce_scatter_evenly(state_at, words_at, code, patience):
    """Do a `reduce_scatter` whose arguments `even_reduction` has written down."""
    state, words = carray(at(state_at, _WORDS), FIRST_INPUT), carray(at(words_at, _WORDS), OF)
    views = carray(at(words_at + 8 * OF, _WORDS), (1, VIEW_WORDS))
    out = carray(at(words_at + 8 * TO, _WORDS), VIEW_WORDS)
    starts = carray(at(words_at + 8 * STARTS, _WORDS), state[WORLD])
    function, count, op = words[FUNCTION], words[ELEMENTS], words[OPERATOR]
    return reduce_scatter(state, views, starts, out, function, count, op, code, patience)
