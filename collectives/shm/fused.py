"""All-reduce, residual add and norm in one kernel over the shared slots.

One-shot: each rank reads all ranks' rows, adds and normalises them all: one crossing. Two-shot: each rank adds its own
rows up and finds their statistics, then takes the others' sums out of their slots and normalises on the way: two
crossings, a part of the adding. Which is faster where was measured (docs/decisions/018-fused-segment.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.kernel_cache import njit
from ...cuda_kernels.quantised import Quantised
from ...cuda_kernels.room import keep_heap
from .calls import code_of
from .engine import KIND, Engine
from .fold import SUM
from .memory import call_fold, store
from .norms import AS_E4M3, AS_INT8, AS_IS, NORM_WORDS, STATS, row_functions
from .places import place_with_results, results_of, shown_by
from .segment import RESULT, SLOT
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
    STEP,
    STUCK,
    WAITING,
    WORLD,
    agree,
    all_came,
    has_come,
    header_word,
    line_of,
    may_fill,
    publish,
)
from .stores import give
from .ways import NORM, SYMMETRIC_NORM, choose, compare, end, filled

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ONE_SHOT_BYTES = {2: 32 << 10}  # by the least number of ranks: up to these bytes of x
CHUNK_BYTES = 512 << 10  # of x in a step, so that slots stay in the cache
STAT_BYTES = 16  # two float64 for each row
_NOWHERE = np.zeros(1, np.int64)
_STORED = {None: AS_IS, torch.int8: AS_INT8, torch.float8_e4m3fn: AS_E4M3}
# words of a call, behind those of the norm
X, RESIDUAL, NORMED, TOTAL, SCALES, ROWS, COUNTED, CHUNK, OUT_ROW, ROW, ONE_SHOT, OFFSET = range(
    NORM_WORDS, NORM_WORDS + 12
)
ELSEWHERE = -1  # the offset of an x that is not in symmetric memory


@njit(nogil=True)
def rows_of(rows, ranks, rank):
    """Split rows over ranks: the first and their number."""
    run = -(-rows // ranks)
    first = min(rank * run, rows)
    return first, min(run, rows - first)


@njit(nogil=True)
def _normalise(words, scale, done, first, rows, source):
    """Normalise rows whose sums lie at `source` into the outputs of this rank."""
    row = done + first
    call_fold(
        scale, words.ctypes.data, rows, source, words[TOTAL] + row * words[ROW],
        words[NORMED] + row * words[OUT_ROW], words[SCALES] + row * 4, 0,
    )  # fmt: skip


@njit(nogil=True)
def _fill(state, words, slot, x, first, run, rows):
    """Show what others read of this step's rows: in the two-shot all but the own rows."""
    if words[ONE_SHOT]:
        give(state, slot, x, rows * words[ROW])
    else:
        after = (first + run) * words[ROW]
        give(state, slot, x, first * words[ROW])
        give(state, slot + after, x + after, rows * words[ROW] - after)


@njit(nogil=True)
def _reduce(state, words, add, scale, done, first, run, shown, stats):
    """Add and normalise some rows of a step, each while it is in the first cache.

    The sums and their statistics are shown at `shown` and `stats`; with `shown` 0, `stats` is room for one row's.
    """
    for r in range(first, first + run):
        row = (done + r) * words[ROW]
        total = words[TOTAL] + row
        words[STATS] = stats + (r - first) * STAT_BYTES if shown else stats
        call_fold(
            add, words.ctypes.data, state[INPUTS], state[WORLD], r * words[ROW], 1,
            words[RESIDUAL] + row, total,
        )  # fmt: skip
        if shown:
            give(state, shown + (r - first) * words[ROW], total, words[ROW])
        _normalise(words, scale, done, r, 1, total)


@njit(nogil=True)
def _find_inputs(state, bases, offset, place, shape):
    """Note where each rank's rows of this step lie; say whether all have the same shape."""
    for r in range(state[WORLD]):
        state[FIRST_INPUT + r] = shown_by(state, r)
        if offset != ELSEWHERE:
            state[FIRST_INPUT + r] = bases[r] + offset + place
        if header_word(state, r, LARGEST) != shape:
            state[STUCK] = r
            return False
    return True


@njit(nogil=True)
def all_reduce_norm(state, words, bases, add, scale, stats, code, patience):
    """Add the ranks' rows to the residual and normalise the sums, a chunk of rows a step.

    Where x lies in symmetric memory (`bases` of the ranks) it is read there, and nothing is copied in; always two-shot,
    for a rank that has all sums knows that nobody reads its x any more.
    """
    rank, world = state[RANK], state[WORLD]
    row_bytes, offset = words[ROW], words[OFFSET]
    shape = row_bytes << 40 | (offset + 1)
    while True:
        step, done = state[STEP], state[PLACE]
        rows = min(words[CHUNK], words[ROWS] - done)
        first, run = rows_of(rows, world, rank)
        place = done * row_bytes
        if state[PHASE] == 0:
            if not may_fill(state, patience):
                return WAITING
            kind = NORM if offset == ELSEWHERE else SYMMETRIC_NORM
            choose(state, kind, words[ROWS] * row_bytes, 2, True)
            place_with_results(state, rows * row_bytes, run * (row_bytes + STAT_BYTES))
            if offset == ELSEWHERE:
                _fill(state, words, shown_by(state, rank), words[X] + place, first, run, rows)
            filled(state)
            publish(state, code, words[COUNTED], shape)
            state[PHASE] = 1
        if state[PHASE] == 1:
            if not all_came(state, step, 2 * step, patience):
                return WAITING
            if not agree(state, code, words[COUNTED]):
                return MISMATCH
            compare(state)
            if not _find_inputs(state, bases, offset, place, shape):
                return MISMATCH
            state[FIRST_INPUT + rank] = words[X] + place
            if words[ONE_SHOT]:
                _reduce(state, words, add, scale, done, 0, rows, 0, stats.ctypes.data)
            else:
                own = results_of(state, rank)
                after = own + run * row_bytes
                _reduce(state, words, add, scale, done, first, run, own, after)
                store(line_of(state, rank, step), 2 * step + 1)
                state[PHASE] = 2
        if state[PHASE] == 2:
            while state[PEER] < world:
                peer = state[PEER]
                if peer != rank:
                    if not has_come(state, peer, step, 2 * step + 1, patience):
                        return WAITING
                    first, run = rows_of(rows, world, peer)
                    theirs = results_of(state, peer)
                    words[STATS] = theirs + run * row_bytes
                    _normalise(words, scale, done, first, run, theirs)
                state[PEER] += 1
        state[STEP] += 1
        state[PHASE] = state[PEER] = 0
        state[PLACE] += rows
        if state[PLACE] >= words[ROWS]:
            end(state)
            return DONE


def rows_of_a_step(rows: int, row_bytes: int, ranks: int) -> int:
    """Cut rows into equal steps that fit slots and the places of results; 0 where not one row does."""
    room = min(SLOT // row_bytes, ranks * (RESULT // (row_bytes + STAT_BYTES)))
    if room == 0:
        return 0
    room = min(room, max(1, CHUNK_BYTES // row_bytes))
    return -(-rows // -(-rows // room))


@lru_cache(maxsize=256)
def schedule(rows: int, row_bytes: int, ranks: int) -> tuple[int, bool]:
    """Choose by what was measured: rows in a step, and whether one-shot."""
    most = next(b for n, b in reversed(ONE_SHOT_BYTES.items()) if n <= ranks)
    return rows_of_a_step(rows, row_bytes, ranks), rows * row_bytes <= most


def serves(
    engine: Engine, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None
) -> bool:
    """Say whether the kernel can do it: plain dense tensors of one dtype, and rows that fit."""
    dtype = x.dtype
    for t in (x, residual, weight, x if bias is None else bias):
        if t.dtype != dtype or not t.is_cpu or not t.is_contiguous():
            return False
    ranks = engine.members.ranks
    if dtype not in DTYPES or ranks == 1:
        return False
    return rows_in(x.shape, dtype.itemsize, ranks) > 0


@lru_cache(maxsize=256)
def rows_in(shape: torch.Size, item: int, ranks: int) -> int:
    """Count the rows of a step for tensors of this shape; 0 where there are none, or they do not fit."""
    rows = shape.numel() // max(1, shape[-1])
    return schedule(rows, shape[-1] * item, ranks)[0] if rows else 0


@lru_cache(maxsize=4096)
def words_of(
    x: int, residual: int, weight: int, bias: int, normed: int, total: int, scales: int,
    shape: torch.Size, dtype: torch.dtype, stored: torch.dtype | None, eps: float, offset: int,
    chunk: int, one_shot: bool,
) -> Any:  # fmt: skip
    """Write down a call for the kernel, which wants a copy of its own; most calls come again at the same addresses."""
    width, item = shape[-1], dtype.itemsize
    rows, row_bytes = shape.numel() // width, width * item
    return np.array([
        weight, bias, int(np.float64(eps).view(np.int64)), width, item, 0, bias != 0, _STORED[stored],
        x, residual, normed, total, scales, rows, shape.numel(), chunk,
        width * (item if stored is None else stored.itemsize), row_bytes,
        one_shot and offset == ELSEWHERE, offset,
    ], np.int64)  # fmt: skip


def run(
    engine: Engine,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    stored: torch.dtype | None,
) -> tuple[Tensor | Quantised, Tensor]:
    """Sum `x` over the ranks, add the residual, normalise; the sum and the normed rows are new tensors."""
    shape, dtype, width, ranks = x.shape, x.dtype, x.shape[-1], engine.members.ranks
    keep_heap()
    total, normed = torch.empty_like(x), torch.empty_like(x, dtype=stored)
    scales = None if stored is None else torch.empty((*shape[:-1], 1), dtype=torch.float32)
    bases, offset = engine.place_of(x) or (_NOWHERE, ELSEWHERE)
    words = words_of(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        normed.data_ptr(), total.data_ptr(), 0 if scales is None else scales.data_ptr(),
        shape, dtype, stored, eps, offset, *schedule(x.numel() // width, width * dtype.itemsize, ranks),
    )  # fmt: skip
    code = code_of(KIND["all_reduce with norm"], dtype, SUM)
    arguments = (words.copy(), bases, *row_functions(dtype), np.empty(2))
    inputs = [x, residual, weight] if bias is None else [x, residual, weight, bias]
    engine.run(all_reduce_norm, arguments, code, x.numel(), [normed, total], True, inputs)
    return normed if scales is None else Quantised(normed, scales), total
