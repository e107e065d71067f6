"""Where in its slot a rank shows the elements of a step: at the start, or further on from step to step.

A store through the cache to a line that another processor holds must first take the line from it. A reader holds
what it has read until its second cache (1 MB) has other things, so calls that write through the cache move on, and
come back to a line when it lies in the common cache only: then it costs half. Past the cache nothing is gained by
that; such calls have a place of their own, for a line that was last written through makes their stores dear.
"""

from __future__ import annotations

from typing import Any

from numba import types

from ...cuda_kernels.kernel_cache import njit
from .segment import PAGE
from .steps import (
    CURSORS,
    READY,
    SETS,
    SHOWN,
    SLOT_BYTES,
    SPAN,
    STEP,
    WAY,
    WAY_WORDS,
    WORLD,
    header_word,
    slot_of,
    tell,
)
from .stores import PAST
from .ways import MOVED

STAYS = 4  # the part of a slot that does not move on is one in so many; so is the most that does
LEAST = 4 << 10  # bytes that are worth it
POPULATE_WRITE = 23  # of madvise; a system without it gives pages when they are touched

madvise: Any = types.ExternalFunction("madvise", types.int32(types.intp, types.intp, types.int32))


@njit(nogil=True)
def pages(count):
    """Round bytes up to whole pages: copies between places equal modulo a page are fastest."""
    return -(-count // PAGE) * PAGE


@njit(nogil=True)
def touch(state):
    """Have the system find memory for all slots, once: a call that meets fresh pages looks dear for its way."""
    stays = state[SLOT_BYTES] // STAYS
    for r in range(state[WORLD]):
        for step in range(2):
            first = (slot_of(state, r, step) + stays) // PAGE * PAGE
            madvise(first, state[SLOT_BYTES] - stays + PAGE, POPULATE_WRITE)
    state[READY] = 1


@njit(nogil=True)
def place(state, count, span, more):
    """Choose where this step's `count` bytes and `more` behind them go, and tell the others.

    `span`: from the elements to the results, or from those for one rank to those for the next.
    """
    stays = state[SLOT_BYTES] // STAYS
    shown, size = 0, pages(count) + pages(more)
    if state[WAY] != PAST and count >= LEAST and size <= stays:
        if not state[READY]:
            touch(state)
        cursor = CURSORS + (state[STEP] & state[SETS])
        shown = state[cursor]
        if shown < stays or shown + size > state[SLOT_BYTES]:
            shown = stays
        state[cursor] = shown + size
        if state[WAY_WORDS]:
            state[state[WAY_WORDS] + MOVED] += size
    tell(state, SHOWN, shown)
    tell(state, SPAN, span)


@njit(nogil=True)
def place_with_results(state, count, results):
    """Choose where this step's elements go, and behind them what this rank makes of all ranks'."""
    place(state, count, pages(count), results)


@njit(nogil=True)
def shown_by(state, rank):
    """Find the elements of this step that a rank shows."""
    return slot_of(state, rank, state[STEP]) + header_word(state, rank, SHOWN)


@njit(nogil=True)
def shown_to(state, rank, to):
    """Find those that are for one rank; a rank's own, where it shows them, are the last."""
    seat = state[WORLD] - 1 if to == rank else to - (to > rank)
    return shown_by(state, rank) + seat * header_word(state, rank, SPAN)


@njit(nogil=True)
def results_of(state, rank):
    """Find what a rank has made of this step's elements."""
    return shown_by(state, rank) + header_word(state, rank, SPAN)
