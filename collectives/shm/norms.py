"""Rows of the residual stream, reduced and normalised: C functions, compiled when a dtype is first used.

The driver in all_reduce_norm.py calls them by address, as all_reduce.py calls those of fold.py. Element by element
they are free of fast math, so that a rank that reduces a row holds the bits of any other that does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, types

from ...cuda_kernels.halves import narrow, widen
from ...cuda_kernels.kernel_cache import cfunc, njit
from ...cuda_kernels.quantised import E4M3_MAX, INT8_MAX, to_e4m3
from ...cuda_kernels.runs import RUN
from .fold import LOOKS
from .memory import at, memmove
from .norm_runs import add_ones, add_runs, scale_ones, scale_runs

# Words that a call hands to these functions: addresses, sizes, eps as the bits of a float64, and two choices.
WEIGHT, BIAS, EPS, WIDTH, STATS, CENTRED, STORED = range(7)
NORM_WORDS = 7
AS_IS, AS_INT8, AS_E4M3 = range(3)  # how the normed rows are stored
_SIGNATURE = types.void(*[types.int64] * 7)  # the words, then what each function says

_WORDS, _REALS, _F4, _U1 = (np.empty(0, look) for look in ("i8", "f8", "f4", "u1"))


@cache
def row_functions(dtype: torch.dtype) -> tuple[int, int]:
    """Find the function that adds rows of a dtype up, and the one that normalises them."""
    return _compiled("adds", dtype).address, _compiled("scales", dtype).address


@cache
def _compiled(kind: str, dtype: torch.dtype) -> Any:
    like, wide = (np.empty(0, look) for look in LOOKS[dtype])
    return {"adds": _adds, "scales": _scales}[kind](like, wide)


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _moments(o, wide):
    """Mean, and mean square about it; of one array, so that every rank sums in one order."""
    n = o.shape[0]
    mean = wide.dtype.type(0)
    for i in range(n):
        mean += widen(o[i])
    mean /= wide.dtype.type(n)
    squares = wide.dtype.type(0)
    for i in range(n):
        x = widen(o[i]) - mean
        squares += x * x
    return mean, squares / wide.dtype.type(n)


def _adds(like: Any, wide: Any) -> Any:
    @cfunc(_SIGNATURE)
    def adds(words, inputs, ranks, offset, rows, residual, total):
        """Add the inputs in rank order and the residual, rounded once; then mean and 1 / deviation of each row."""
        word = carray(at(words, _WORDS), NORM_WORDS)
        width, row_bytes = word[WIDTH], word[WIDTH] * like.itemsize
        many, ones, end = width // RUN, width % RUN, width // RUN * RUN * like.itemsize
        eps = carray(at(words + 8 * EPS, _REALS), 1)[0]
        stats = carray(at(word[STATS], _REALS), 2 * rows)
        for r in range(rows):
            place = r * row_bytes
            out, of, old = total + place, offset + place, residual + place
            squares = add_runs(out, inputs, ranks, of, old, many, like)
            squares += add_ones(out + end, inputs, ranks, of + end, old + end, ones, like)
            mean, square = wide.dtype.type(0), squares / wide.dtype.type(width)
            if word[CENTRED]:
                mean, square = _moments(carray(at(out, like), width), wide)
            stats[2 * r] = mean
            stats[2 * r + 1] = wide.dtype.type(1) / np.sqrt(square + wide.dtype.type(eps))

    return adds


@njit(nogil=True)
def _centre(t, w, b, mean, scale, out):
    """One row: `(t - mean) * scale * w + b`."""
    for i in range(t.shape[0]):
        out[i] = narrow((widen(t[i]) - mean) * scale * widen(w[i]) + widen(b[i]), out)


@njit(nogil=True)
def _quantise(normed, stored, out):
    """One row divided by its largest magnitude over the format's, which is returned."""
    largest = np.float32(0)
    for i in range(normed.shape[0]):
        largest = max(largest, np.float32(abs(widen(normed[i]))))
    top = np.float32(INT8_MAX if stored == AS_INT8 else E4M3_MAX)
    step = largest / top if largest > 0 else np.float32(1)
    if stored == AS_INT8:
        for i in range(normed.shape[0]):
            out[i] = np.uint8(np.int8(np.rint(np.float32(widen(normed[i])) / step)))
    else:
        for i in range(normed.shape[0]):
            out[i] = to_e4m3(np.float32(widen(normed[i])) / step)
    return step


def _scales(like: Any, wide: Any) -> Any:
    @cfunc(_SIGNATURE)
    def scales(words, rows, source, total, normed, row_scales, unused):
        """Normalise rows by their statistics, copy them to `total`, and store them as asked."""
        word = carray(at(words, _WORDS), NORM_WORDS)
        width, row_bytes, weight = word[WIDTH], word[WIDTH] * like.itemsize, word[WEIGHT]
        many, ones, end = width // RUN, width % RUN, width // RUN * RUN * like.itemsize
        stats = carray(at(word[STATS], _REALS), 2 * rows)
        w, b = carray(at(weight, like), width), carray(at(word[BIAS], like), width)
        stored = word[STORED]
        row = np.empty(0 if stored == AS_IS else width, like.dtype)
        for r in range(rows):
            of, home = source + r * row_bytes, total + r * row_bytes
            out = normed + r * row_bytes if stored == AS_IS else np.int64(row.ctypes.data)
            mean, scale = wide.dtype.type(stats[2 * r]), wide.dtype.type(stats[2 * r + 1])
            if word[CENTRED]:
                memmove(home, of, row_bytes)
                _centre(
                    carray(at(home, like), width), w, b, mean, scale, carray(at(out, like), width)
                )
            else:
                scale_runs(out, home, of, weight, scale, many, like)
                scale_ones(out + end, home + end, of + end, weight + end, scale, ones, like)
            if stored != AS_IS:
                values = carray(at(normed + r * width, _U1), width)
                carray(at(row_scales + 4 * r, _F4), 1)[0] = _quantise(row, stored, values)

    return scales
