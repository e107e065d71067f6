"""All-reduce, residual add and norm in one kernel over the shared slots.

One-shot: each rank reads all ranks' rows, adds and normalises them all: one crossing. Two-shot: each rank adds its own
rows up and finds their statistics, then takes the others' sums out of their slots and normalises on the way: two
crossings, a part of the adding. Which is faster where was measured (docs/decisions/018-fused-segment.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor
from torch.nn import Parameter

from ...cuda_kernels.kernel_cache import entry, njit
from ...cuda_kernels.quantised import Quantised
from ...cuda_kernels.room import keep_heap
from ..trace import listening
from .calls import KIND, code_of
from .engine import Engine
from .fold import SUM
from .memory import at, call_fold, store
from .norms import (
    AS_E4M3,
    AS_INT8,
    AS_IS,
    BIAS,
    NORM_WORDS,
    STATS,
    WEIGHT,
    row_functions,
)
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
    SCRATCH,
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
from .work import PATIENCE

PLAIN = {Tensor, Parameter}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ONE_SHOT_BYTES = {2: 32 << 10}  # by the least number of ranks: up to these bytes of x
CHUNK_BYTES = 512 << 10  # of x in a step, so that slots stay in the cache
STAT_BYTES = 16  # two float64 for each row
_STORED = {None: AS_IS, torch.int8: AS_INT8, torch.float8_e4m3fn: AS_E4M3}
# words behind those of the norm that calls of one form share, and then those of a call
ADD, SCALE, ROWS, COUNTED, CHUNK, OUT_ROW, ROW, ONE_SHOT = range(NORM_WORDS, NORM_WORDS + 8)
FORM_WORDS = ONE_SHOT + 1
RESIDUAL, NORMED, TOTAL, SCALES = range(FORM_WORDS, FORM_WORDS + 4)
WORDS = SCALES + 1
ELSEWHERE = -1  # the offset of an x that is not in symmetric memory
NOWHERE = None, ELSEWHERE
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
def _fill(state, words, one_shot, slot, x, first, run, rows):
    """Show what others read of this step's rows: in the two-shot all but the own rows."""
    if one_shot:
        give(state, slot, x, rows * words[ROW])
    else:
        after = (first + run) * words[ROW]
        give(state, slot, x, first * words[ROW])
        give(state, slot + after, x + after, rows * words[ROW] - after)


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
def _show_sums(state, words, done, first, run):
    """Add the own rows of a step up, and show each while it is in the first cache; then normalise them."""
    shown = results_of(state, state[RANK])
    stats = shown + run * words[ROW]
    for r in range(run):
        total = _add(state, words, done, first + r, stats + r * STAT_BYTES)
        give(state, shown + r * words[ROW], total, words[ROW])
    store(line_of(state, state[RANK], state[STEP]), 2 * state[STEP] + 1)
    words[STATS] = stats
    _normalise(words, done, first, run, words[TOTAL] + (done + first) * words[ROW])


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
    rank, world = state[RANK], state[WORLD]
    row_bytes = words[ROW]
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
                _fill(state, words, one_shot, shown_by(state, rank), x + place, first, run, rows)
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
            state[FIRST_INPUT + rank] = x + place
            if one_shot:
                stats = state[SCRATCH] + 8 * WORDS
                for r in range(rows):
                    _normalise(words, done, r, 1, _add(state, words, done, r, stats))
            else:
                _show_sums(state, words, done, first, run)
                state[PHASE] = 2
        if state[PHASE] == 2 and not _take_sums(state, words, done, rows, patience):
            return WAITING
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


def schedule(rows: int, row_bytes: int, ranks: int) -> tuple[int, bool]:
    """Choose by what was measured: rows in a step, and whether one-shot."""
    most = next(b for n, b in reversed(ONE_SHOT_BYTES.items()) if n <= ranks)
    return rows_of_a_step(rows, row_bytes, ranks), rows * row_bytes <= most


class Form(NamedTuple):
    """What calls of one kind share, where that stands in memory, their code and their elements."""

    words: Any
    at: int
    code: int
    count: int

    def __call__(self, state: Any, *arguments: int) -> int:
        """Run the kernel as those are run whose arguments are arrays."""
        return entry(all_reduce_norm)(state.ctypes.data, self.at, *arguments)


@lru_cache(maxsize=256)
def form_of(
    shape: torch.Size, dtype: torch.dtype, stored: torch.dtype | None, eps: float, centred: bool,
    ranks: int,
) -> Form | None:  # fmt: skip
    """Write down what calls on such tensors share; None where the kernel does not take them, for its dtypes or size."""
    width, item = shape[-1], dtype.itemsize
    rows, row_bytes = shape.numel() // max(1, width), width * item
    chunk, one_shot = schedule(rows, row_bytes, ranks) if rows else (0, False)
    if dtype not in DTYPES or ranks == 1 or chunk == 0:
        return None
    keep_heap()
    words = np.array([
        0, 0, int(np.float64(eps).view(np.int64)), width, 0, centred, _STORED[stored], *row_functions(dtype),
        rows, shape.numel(), chunk, width * (item if stored is None else stored.itemsize), row_bytes, one_shot,
    ], np.int64)  # fmt: skip
    code = code_of(KIND["all_reduce with norm"], dtype, SUM)
    return Form(words, words.ctypes.data, code, shape.numel())


class FusedNorm:
    """The calls of one engine; their kernel is called by address."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._ranks = engine, engine.members.ranks
        self._kernel, self._state_at = entry(all_reduce_norm), engine.state.ctypes.data

    def run(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
        stored: torch.dtype | None,
    ) -> tuple[Tensor | Quantised, Tensor] | None:  # fmt: skip
        """Sum `x` over the ranks, add the residual, normalise; the sum and the normed rows are new tensors.

        None, with nothing done, where these do not suit it: dense tensors of one dtype, whose rows fit, do.
        """
        dtype, shape = x.dtype, x.shape
        # written out: a loop over the tensors takes twice the time
        if not (
            residual.dtype is dtype is weight.dtype
            and type(x) is Tensor is type(residual) and type(weight) in PLAIN
            and x.is_cpu and residual.is_cpu and weight.is_cpu
            and x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()
        ) or x.is_neg() or residual.is_neg():  # fmt: skip
            return None
        inputs = [x, residual, weight]
        if bias is not None:
            plain = type(bias) in PLAIN and bias.dtype is dtype and bias.is_cpu
            if not plain or not bias.is_contiguous():
                return None
            inputs.append(bias)
        form = form_of(shape, dtype, stored, eps, bias is not None, self._ranks)
        if form is None:
            return None
        total, scales = torch.empty_like(x), None
        if stored is None:
            normed = torch.empty_like(x)
        else:
            normed = torch.empty_like(x, dtype=stored)
            scales = torch.empty((*shape[:-1], 1), dtype=torch.float32)
        bases, offset = self._engine.place_of(x) or NOWHERE
        arguments = (
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            normed.data_ptr(), total.data_ptr(), 0 if scales is None else scales.data_ptr(),
            0 if bases is None else bases.ctypes.data, offset,
        )  # fmt: skip
        self._do(form, arguments, [normed, total], inputs)
        return normed if scales is None else Quantised(normed, scales), total

    def _do(
        self, form: Form, arguments: tuple[int, ...], outputs: list[Tensor], inputs: list[Tensor]
    ) -> None:
        engine, (_, at, code, count) = self._engine, form
        if not engine.shows_calls and not listening():  # most calls: what `run` does, in less time
            progress, work = engine.progress, None
            with progress.lock:
                if not progress.collectives and progress.broken is None:
                    if self._kernel(self._state_at, at, *arguments, code, PATIENCE) == DONE:
                        return
                    work = engine.pend(form, arguments, code, count, outputs, inputs)
            if work is not None:
                work.wait()
                return
        engine.run(form, arguments, code, count, outputs, True, inputs)
