"""Reduce-scatter over the ranks of a group: every element in rank order, so the bits are those of an all-reduce."""

from __future__ import annotations

import numpy as np
from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .all_reduce import ELEMENTS, FUNCTION, OF, OPERATOR
from .fold import fold
from .memory import VIEW_WORDS, at, put
from .places import pages, place, shown_to
from .steps import (
    DONE,
    FIRST_INPUT,
    PHASE,
    PLACE,
    RANK,
    SLOT_BYTES,
    STEP,
    WAITING,
    WORLD,
    may_fill,
    publish,
    slot_of,
)
from .stores import show
from .ways import SCATTER, choose, ends, filled, meet

# words behind those of an all-reduce that is written down: the view of what remains, and where the ranks' runs begin
TO = OF + VIEW_WORDS
STARTS = TO + VIEW_WORDS
_WORDS = np.empty(0, np.int64)


@njit(nogil=True, forceinline=True)
def show_runs(state, views, starts, done, n, piece, stays):
    """Show each rank its elements of this step; the own ones, too, unless they are read where they lie."""
    rank, world, item = state[RANK], state[WORLD], views[0, 2]
    span = min(pages(n * item), piece)
    place(state, (world - stays) * span, span, 0)
    for r in range(world):
        if r != rank or not stays:
            view = views[r if views.shape[0] > 1 else 0]
            show(state, view, starts[r] + done, n, shown_to(state, rank, r))


@njit(nogil=True, forceinline=True)
def reduce_run(state, function, op, out, done, n, home, stays):
    """Reduce this rank's elements of this step into `out`; its own lie at `home`, if they are read there."""
    rank, item = state[RANK], out[2]
    for r in range(state[WORLD]):
        state[FIRST_INPUT + r] = shown_to(state, r, rank)
    if stays:
        state[FIRST_INPUT + rank] = home + done * item
    if out[1] == 0:
        fold(state, out[0] + done * item, 0, n, function, op)
    else:
        result = slot_of(state, rank, state[STEP]) + state[SLOT_BYTES]
        fold(state, result, 0, n, function, op)
        put(out, done, n, result)


@njit(nogil=True, forceinline=True)
def reduce_scatter(state, views, starts, out, function, count, op, code, patience):
    """Reduce `count` elements for each rank: those that `starts` shows in a view, or in one for each rank.

    A slot is cut into a piece for each rank; one step moves as many elements as a piece holds. The own part is read
    where it lies, if it is dense and `out` is not a part of it.
    """
    rank, item = state[RANK], out[2]
    piece = (state[SLOT_BYTES] // state[WORLD]) // 64 * 64
    own = views[rank if views.shape[0] > 1 else 0]
    home = own[0] + starts[rank] * item
    apart = out[0] + count * item <= home or home + count * item <= out[0]
    stays = own[1] == 0 and out[1] == 0 and apart
    while True:
        done = state[PLACE]
        n = min(piece // item, count - done)
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            choose(state, SCATTER, count * item, 2, True)
            show_runs(state, views, starts, done, n, piece, stays)
            filled(state)
            publish(state, code, count, 0)
            state[PHASE] = 1
        status = meet(state, code, count, patience)
        if status != DONE:
            return status
        reduce_run(state, function, op, out, done, n, home, stays)
        if ends(state, n, count):
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
