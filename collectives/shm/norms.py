"""Rows of the residual stream, reduced and normalised: C functions, compiled when a dtype is first used.

The driver in fused.py calls them by address, as reductions.py calls those of fold.py. Element by element they
are free of fast math, so that a rank that reduces a row holds the bits of any other that does.
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
from .fold import LOOKS
from .memory import at, memmove

# Words that a call hands to these functions: addresses, sizes, eps as the bits of a float64, and two choices.
WEIGHT, BIAS, EPS, WIDTH, ITEM, STATS, CENTRED, STORED = range(8)
NORM_WORDS = 8
AS_IS, AS_INT8, AS_E4M3 = range(3)  # how the normed rows are stored
PIECE = 1024  # elements of a row handled at a time
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


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _and_square(squares, x):
    """Add a square, in whatever order is fastest; inlined, what surrounds it keeps its own order."""
    return squares + x * x


def _adds(like: Any, wide: Any) -> Any:
    @cfunc(_SIGNATURE)
    def adds(words, inputs, ranks, offset, rows, residual, total):
        """Add the inputs in rank order and the residual, rounded once; then mean and 1 / deviation of each row."""
        word = carray(at(words, _WORDS), NORM_WORDS)
        width, row_bytes = word[WIDTH], word[WIDTH] * word[ITEM]
        eps = carray(at(words + 8 * EPS, _REALS), 1)[0]
        stats = carray(at(word[STATS], _REALS), 2 * rows)
        of = carray(at(inputs, _WORDS), ranks)
        w = np.empty(PIECE, wide.dtype)
        for r in range(rows):
            squares = wide.dtype.type(0)
            for start in range(0, width, PIECE):
                n = min(PIECE, width - start)
                place = r * row_bytes + start * like.itemsize
                o = carray(at(total + place, like), n)
                x = carray(at(residual + place, like), n)
                a = carray(at(of[0] + offset + place, like), n)
                b = carray(at(of[1] + offset + place, like), n)
                if ranks == 2:
                    for i in range(n):
                        value = narrow(widen(a[i]) + widen(b[i]) + widen(x[i]), like)
                        o[i] = value
                        squares = _and_square(squares, widen(value))
                    continue
                for i in range(n):
                    w[i] = widen(a[i]) + widen(b[i])
                for p in range(2, ranks):
                    b = carray(at(of[p] + offset + place, like), n)
                    for i in range(n):
                        w[i] += widen(b[i])
                for i in range(n):
                    value = narrow(w[i] + widen(x[i]), like)
                    o[i] = value
                    squares = _and_square(squares, widen(value))
            mean, square = wide.dtype.type(0), squares / wide.dtype.type(width)
            if word[CENTRED]:
                mean, square = _moments(carray(at(total + r * row_bytes, like), width), wide)
            stats[2 * r] = mean
            stats[2 * r + 1] = wide.dtype.type(1) / np.sqrt(square + wide.dtype.type(eps))

    return adds


@njit(nogil=True)
def _normalise(t, w, b, mean, scale, centred, out):
    """One row: `(t - mean) * scale * w + b`, or as RMSNorm rounds it."""
    if centred:
        for i in range(t.shape[0]):
            out[i] = narrow((widen(t[i]) - mean) * scale * widen(w[i]) + widen(b[i]), out)
    else:
        for i in range(t.shape[0]):
            out[i] = narrow(widen(narrow(widen(t[i]) * scale, out)) * widen(w[i]), out)


@njit(nogil=True)
def _normalise_and_copy(t, w, b, mean, scale, centred, out, copy):
    """As `_normalise`; the row itself is read once for both."""
    if centred:
        for i in range(t.shape[0]):
            copy[i] = t[i]
            out[i] = narrow((widen(t[i]) - mean) * scale * widen(w[i]) + widen(b[i]), out)
    else:
        for i in range(t.shape[0]):
            copy[i] = t[i]
            out[i] = narrow(widen(narrow(widen(t[i]) * scale, out)) * widen(w[i]), out)


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
        """Normalise rows by their statistics, copy them where `total` is elsewhere, and store them as asked."""
        word = carray(at(words, _WORDS), NORM_WORDS)
        width, row_bytes = word[WIDTH], word[WIDTH] * word[ITEM]
        stats = carray(at(word[STATS], _REALS), 2 * rows)
        w = carray(at(word[WEIGHT], like), width)
        b = carray(at(word[BIAS], like), width)
        row = np.empty(0 if word[STORED] == AS_IS else width, like.dtype)
        for r in range(rows):
            t = carray(at(source + r * row_bytes, like), width)
            home = carray(at(total + r * row_bytes, like), width)
            mean, scale = wide.dtype.type(stats[2 * r]), wide.dtype.type(stats[2 * r + 1])
            if word[STORED] == AS_IS:
                out = carray(at(normed + r * row_bytes, like), width)
                if total == source:
                    _normalise(t, w, b, mean, scale, word[CENTRED], out)
                else:
                    _normalise_and_copy(t, w, b, mean, scale, word[CENTRED], out, home)
            else:
                if total != source:
                    memmove(total + r * row_bytes, source + r * row_bytes, row_bytes)
                _normalise(home, w, b, mean, scale, word[CENTRED], row)
                values = carray(at(normed + r * width, _U1), width)
                carray(at(row_scales + 4 * r, _F4), 1)[0] = _quantise(row, word[STORED], values)

    return scales
