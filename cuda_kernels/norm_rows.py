"""Rows added to the residual stream and normalised, on the CPU: vectors, whose squares are summed in one order.

Two passes over a row, the second of which finds the sum in the first or second cache, and has the next row brought
there: else memory would rest meanwhile. Large results are stored past the cache, and the sum besides to a row that
stays in it; no bit depends on that. An ordinary store to memory reads the line first: six rows move instead of four.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils

from .kernel_cache import njit
from .runs import RUN, add_product, folded, load_run, parts_of, run_bytes, run_of, sums_of
from .vectors import LINE, fence, fetch, intrinsic, moved, spread, store, store_past


def _pairs(
    builder: Any, element: Any, count: int, rows: tuple[Any, Any], index: Any
) -> Iterator[tuple[Any, Any]]:
    """Load the run of this number from each of two rows, as pairs of vectors."""
    step = run_bytes(element, count)
    held = [load_run(builder, moved(builder, row, index, step), element, count) for row in rows]
    return zip(*held, strict=True)


def _adding(count: int, past: bool) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kept, to, x, residual, times = args[:5]
        element = signature.args[5].dtype
        step = run_bytes(element, count)
        sums = sums_of(builder, element, count, signature.return_type.bitwidth)
        with cgutils.for_range(builder, times) as loop:
            pairs = _pairs(builder, element, count, (residual, x), loop.index)
            made = run_of(builder, [builder.fadd(a, b) for a, b in pairs], element)
            store(builder, moved(builder, kept, loop.index, step), made)
            if past:
                store_past(builder, moved(builder, to, loop.index, step), made, LINE)
            for total, part in zip(sums, parts_of(builder, made, element), strict=True):
                add_product(builder, total, part, part)
        return folded(builder, sums)

    return build


def normed_run(builder: Any, held: Any, scale: Any, weights: Any, element: Any) -> Any:
    """Multiply a run by a number, round it, and multiply it by the weight."""
    factor = spread(builder, scale, held[0].type)
    normed = run_of(builder, [builder.fmul(part, factor) for part in held], element)
    pairs = zip(parts_of(builder, normed, element), weights, strict=True)
    return run_of(builder, [builder.fmul(a, b) for a, b in pairs], element)


def _scaling(count: int, past: bool) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, kept, weight, scale, times, *ahead = args[:7]
        element = signature.args[7].dtype
        step = run_bytes(element, count)
        with cgutils.for_range(builder, times) as loop:
            if count == RUN:
                for row in ahead:
                    fetch(builder, moved(builder, row, loop.index, step), step)
            held, weights = zip(
                *_pairs(builder, element, count, (kept, weight), loop.index), strict=True
            )
            made = normed_run(builder, held, scale, weights, element)
            place = moved(builder, to, loop.index, step)
            if past:
                store_past(builder, place, made, LINE)
            else:
                store(builder, place, made)
        return context.get_dummy_value()

    return build


def _add(count: int, past: bool = False) -> Any:
    @intrinsic
    def add(typingctx, kept, to, x, residual, times, like):
        """Write residual + x to `kept`, if `past` to `to` as well, and give the sum of its squares."""
        wide = types.float64 if like.dtype == types.float64 else types.float32
        return wide(kept, to, x, residual, times, like), _adding(count, past)

    return add


def _scale(count: int, past: bool = False) -> Any:
    @intrinsic
    def scaled(typingctx, to, kept, weight, scale, times, ahead, also, like):
        """Write kept * scale, rounded, * weight, while two rows are brought near that come next."""
        signature = types.void(to, kept, weight, scale, times, ahead, also, like)
        return signature, _scaling(count, past)

    return scaled


_add_runs, _add_ones, _add_past = _add(RUN), _add(1), _add(RUN, past=True)
_scale_runs, _scale_ones, _scale_past = _scale(RUN), _scale(1), _scale(RUN, past=True)


@njit(nogil=True, error_model="numpy")
def norm_rows(x, residual, weight, normed, total, width, eps, past, like, wide, start, stop):
    """Rows start..stop at these addresses, of elements as in `like`, computed with as those of `wide`.

    `past` needs rows of whole runs, and results that start where lines of the cache do.
    """
    kind, item = wide.dtype.type, like.itemsize
    many, ones = width // RUN, width % RUN
    end, row_bytes = many * RUN * item, width * item
    row = np.empty(width if past else 0, like.dtype)
    for r in range(start, stop):
        at = r * row_bytes
        a, b, new, out = x + at, residual + at, total + at, normed + at
        if past:
            kept = np.int64(row.ctypes.data)
            squares = _add_past(kept, new, a, b, many, like)
        else:
            kept = new
            squares = _add_runs(kept, new, a, b, many, like)
            squares += _add_ones(kept + end, new + end, a + end, b + end, ones, like)
        scale = kind(1) / np.sqrt(squares / kind(width) + kind(eps))
        c, d = a + row_bytes, b + row_bytes
        if past:
            _scale_past(out, kept, weight, scale, many, c, d, like)
        else:
            _scale_runs(out, kept, weight, scale, many, c, d, like)
            _scale_ones(out + end, kept + end, weight + end, scale, ones, c, d, like)
    if past:
        fence()
