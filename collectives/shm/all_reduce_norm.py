"""All-reduce, residual add and norm in one kernel over the shared slots; what calls it is in fused.py.

One-shot: each rank reads all ranks' rows, adds and normalises them all: one crossing. Two-shot: each rank adds its own
rows up and finds their statistics, then takes the others' sums out of their slots and normalises on the way: two
crossings, a part of the adding. Which is faster where was measured (docs/decisions/018-fused-segment.md).
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .memory import at, call_fold, store
from .norms import BIAS, NORM_WORDS, STATS, WEIGHT
from .places import place_with_results, results_of, shown_by
from .steps import (
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
    STEP,
    STUCK,
    WAITING,
    WORLD,
    has_come,
    header_word,
    line_of,
    may_fill,
    publish,
)
from .stores import give
from .ways import NORM, SYMMETRIC_NORM, choose, ends, filled, meet

STAT_BYTES = 16  # two float64 for each row
# words behind those of the norm that calls of one form share, and then those of a call
ADD, SCALE, ROWS, COUNTED, CHUNK, OUT_ROW, ROW, ONE_SHOT = range(NORM_WORDS, NORM_WORDS + 8)
FORM_WORDS = ONE_SHOT + 1
RESIDUAL, NORMED, TOTAL, SCALES = range(FORM_WORDS, FORM_WORDS + 4)
WORDS = SCALES + 1
ELSEWHERE = -1  # the offset of an x that is not in symmetric memory
_WORDS = np.empty(0, np.int64)


@njit(nogil=True)
def rows_of(rows, ranks, rank):
    """Split rows over ranks: the first and their number."""
    run = -(-rows // ranks)
    first = min(rank * run, rows)
    return first, min(run, rows - first)


@njit(nogil=True)
def _normalise(words, done, first, rows, source):
    """Normalise rows whose sums lie at `source` into the outputs of this rank."""
    row = done + first
    call_fold(
        words[SCALE], words.ctypes.data, rows, source, words[TOTAL] + row * words[ROW],
        words[NORMED] + row * words[OUT_ROW], words[SCALES] + row * 4, 0,
    )  # fmt: skip


@njit(nogil=True)
def _show_rows(state, words, one_shot, x, offset, rows):
    """Show what others read of this step's rows: in the two-shot all but the own, of symmetric memory none."""
    row, done = words[ROW], state[PLACE]
    first, run = rows_of(rows, state[WORLD], state[RANK])
    choose(state, NORM if offset == ELSEWHERE else SYMMETRIC_NORM, words[ROWS] * row, 2, True)
    place_with_results(state, rows * row, run * (row + STAT_BYTES))
    slot, x = shown_by(state, state[RANK]), x + done * row
    if one_shot:
        give(state, slot, x, rows * row)
    elif offset == ELSEWHERE:
        after = (first + run) * row
        give(state, slot, x, first * row)
        give(state, slot + after, x + after, rows * row - after)
    filled(state)


@njit(nogil=True)
def _add(state, words, done, r, stats):
    """Add a row of a step up, at home, and note its statistics; say where it is."""
    row = (done + r) * words[ROW]
    words[STATS] = stats
    call_fold(
        words[ADD], words.ctypes.data, state[INPUTS], state[WORLD], r * words[ROW], 1,
        words[RESIDUAL] + row, words[TOTAL] + row,
    )  # fmt: skip
    return words[TOTAL] + row


@njit(nogil=True)
def _do_all(state, words, done, rows):
    """Add all rows of a step up, and normalise each while it is in the first cache."""
    stats = state[SCRATCH] + 8 * WORDS
    for r in range(rows):
        _normalise(words, done, r, 1, _add(state, words, done, r, stats))


@njit(nogil=True)
def _show_sums(state, words, done, rows):
    """Add the own rows of a step up, and show each while it is in the first cache; then normalise them."""
    first, run = rows_of(rows, state[WORLD], state[RANK])
    shown = results_of(state, state[RANK])
    stats = shown + run * words[ROW]
    for r in range(run):
        total = _add(state, words, done, first + r, stats + r * STAT_BYTES)
        give(state, shown + r * words[ROW], total, words[ROW])
    store(line_of(state, state[RANK], state[STEP]), 2 * state[STEP] + 1)
    words[STATS] = stats
    _normalise(words, done, first, run, words[TOTAL] + (done + first) * words[ROW])


@njit(nogil=True)
def _find_inputs(state, x, bases, offset, place, shape):
    """Note where each rank's rows of this step lie; say whether all have the same shape."""
    for r in range(state[WORLD]):
        state[FIRST_INPUT + r] = shown_by(state, r)
        if offset != ELSEWHERE:
            state[FIRST_INPUT + r] = bases[r] + offset + place
        if header_word(state, r, LARGEST) != shape:
            state[STUCK] = r
            return False
    state[FIRST_INPUT + state[RANK]] = x + place
    return True


@njit(nogil=True)
def _take_sums(state, words, done, rows, patience):
    """Normalise the others' rows of a step, and bring their sums home; say whether all have come."""
    step = state[STEP]
    while state[PEER] < state[WORLD]:
        peer = state[PEER]
        if peer != state[RANK]:
            if not has_come(state, peer, step, 2 * step + 1, patience):
                return False
            first, run = rows_of(rows, state[WORLD], peer)
            theirs = results_of(state, peer)
            words[STATS] = theirs + run * words[ROW]
            _normalise(words, done, first, run, theirs)
        state[PEER] += 1
    return True


@njit(nogil=True)
def all_reduce_norm(
    state_at, form_at, x, residual, weight, bias, normed, total, scales, bases_at, offset, code, patience
):  # fmt: skip
    """Add the ranks' rows to the residual and normalise the sums, a chunk of rows a step.

    Where x lies in symmetric memory (`bases` of the ranks) it is read there, and nothing is copied in; always two-shot,
    for a rank that has all sums knows that nobody reads its x any more.
    """
    state, form = carray(at(state_at, _WORDS), FIRST_INPUT), carray(at(form_at, _WORDS), FORM_WORDS)
    bases, words = carray(at(bases_at, _WORDS), 1), carray(at(state[SCRATCH], _WORDS), WORDS)
    for i in range(FORM_WORDS):
        words[i] = form[i]
    words[WEIGHT], words[BIAS], words[RESIDUAL] = weight, bias, residual
    words[NORMED], words[TOTAL], words[SCALES] = normed, total, scales
    one_shot = words[ONE_SHOT] and offset == ELSEWHERE
    shape = words[ROW] << 40 | (offset + 1)
    while True:
        done = state[PLACE]
        rows = min(words[CHUNK], words[ROWS] - done)
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            _show_rows(state, words, one_shot, x, offset, rows)
            publish(state, code, words[COUNTED], shape)
            state[PHASE] = 1
        if state[PHASE] == 1:
            status = meet(state, code, words[COUNTED], patience)
            if status != DONE:
                return status
            if not _find_inputs(state, x, bases, offset, done * words[ROW], shape):
                return MISMATCH
            if one_shot:
                _do_all(state, words, done, rows)
            else:
                _show_sums(state, words, done, rows)
                state[PHASE] = 2
        if state[PHASE] == 2 and not _take_sums(state, words, done, rows, patience):
            return WAITING
        if ends(state, rows, words[ROWS]):
            return DONE
