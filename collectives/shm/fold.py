"""Reducing the memory of all ranks, for each dtype: C functions, compiled when a dtype is first reduced.

The kernels of all-reduce and reduce-scatter call them by address, so that those are compiled once for all dtypes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, types

from ...cuda_kernels.halves import narrow, widen
from ...cuda_kernels.kernel_cache import cfunc, njit
from .memory import at, call_fold
from .steps import INPUTS, SCRATCH, WORLD

BLOCK = 2048  # elements reduced at a time, so that the sums stay in the first cache
SCRATCH_BYTES = 2 * BLOCK * 8  # wide sums, and behind them what was reduced

SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR = range(8)

# How a dtype looks to a kernel, and in what it is summed. See cuda_kernels/halves.py for the 16-bit floats.
LOOKS: dict[torch.dtype, tuple[str, str]] = {
    torch.float32: ("f4", "f4"),
    torch.float64: ("f8", "f8"),
    torch.bfloat16: ("u2", "f4"),
    torch.float16: ("i2", "f4"),
    torch.int8: ("i1", "i1"),
    torch.uint8: ("u1", "u1"),
    torch.int32: ("i4", "i4"),
    torch.int64: ("i8", "i8"),
    torch.bool: ("u1", "u1"),
}
# out, addresses of the ranks' memory, ranks, first element, elements, operator, scratch memory
_SIGNATURE = types.void(*[types.int64] * 7)


@njit(nogil=True)
def fold(state, out, first, count, function, op):
    """Reduce elements of the memory at the ranks' inputs into `out`."""
    call_fold(function, out, state[INPUTS], state[WORLD], first, count, op, state[SCRATCH])


def fold_address(dtype: torch.dtype, op: int) -> int:
    """Find the function that reduces by this operator."""
    kind = "sums" if op <= AVG else "picks" if op < BAND else "bits"
    return _compiled(kind, *LOOKS[dtype]).address


@cache
def _compiled(kind: str, look: str, sum_look: str) -> Any:
    like, wide = np.empty(0, look), np.empty(0, sum_look)
    return {"sums": _sums, "picks": _picks, "bits": _bits}[kind](like, wide)


def _sums(like: Any, wide: Any) -> Any:
    @cfunc(_SIGNATURE)
    def sums(out, inputs, ranks, first, count, op, scratch):
        item = like.itemsize
        of = carray(at(inputs, _ADDRESS), ranks)
        for start in range(0, count, BLOCK):
            n = min(BLOCK, count - start)
            offset = (first + start) * item
            o = carray(at(out + start * item, like), n)
            a = carray(at(of[0] + offset, like), n)
            b = carray(at(of[1] + offset, like), n)
            if op == SUM and ranks == 2:
                for i in range(n):
                    o[i] = narrow(widen(a[i]) + widen(b[i]), like)
                continue
            if op == SUM and ranks == 4:
                c = carray(at(of[2] + offset, like), n)
                d = carray(at(of[3] + offset, like), n)
                for i in range(n):
                    o[i] = narrow(widen(a[i]) + widen(b[i]) + widen(c[i]) + widen(d[i]), like)
                continue
            w = carray(at(scratch, wide), n)
            for i in range(n):
                w[i] = widen(a[i]) + widen(b[i])
            for r in range(2, ranks):
                x = carray(at(of[r] + offset, like), n)
                for i in range(n):
                    w[i] += widen(x[i])
            if op == AVG:
                for i in range(n):
                    w[i] /= ranks
            for i in range(n):
                o[i] = narrow(w[i], like)

    return sums


def _picks(like: Any, wide: Any) -> Any:
    @cfunc(_SIGNATURE)
    def picks(out, inputs, ranks, first, count, op, scratch):
        item = like.itemsize
        of = carray(at(inputs, _ADDRESS), ranks)
        for start in range(0, count, BLOCK):
            n = min(BLOCK, count - start)
            offset = (first + start) * item
            w = carray(at(scratch, wide), n)
            for r in range(ranks):
                x = carray(at(of[r] + offset, like), n)
                if r == 0:
                    for i in range(n):
                        w[i] = widen(x[i])
                elif op == PRODUCT:
                    for i in range(n):
                        w[i] *= widen(x[i])
                elif op == MIN:
                    for i in range(n):
                        value = widen(x[i])  # a NaN stays
                        w[i] = value if value < w[i] or value != value else w[i]
                else:
                    for i in range(n):
                        value = widen(x[i])
                        w[i] = value if value > w[i] or value != value else w[i]
            o = carray(at(out + start * item, like), n)
            for i in range(n):
                o[i] = narrow(w[i], like)

    return picks


def _bits(like: Any, wide: Any) -> Any:
    @cfunc(_SIGNATURE)
    def bits(out, inputs, ranks, first, count, op, scratch):
        of = carray(at(inputs, _ADDRESS), ranks)
        o = carray(at(out, like), count)
        for r in range(ranks):
            x = carray(at(of[r] + first * like.itemsize, like), count)
            if r == 0:
                o[:] = x
            elif op == BAND:
                for i in range(count):
                    o[i] &= x[i]
            elif op == BOR:
                for i in range(count):
                    o[i] |= x[i]
            else:
                for i in range(count):
                    o[i] ^= x[i]

    return bits


_ADDRESS = np.empty(0, np.int64)
