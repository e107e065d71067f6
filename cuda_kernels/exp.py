"""Vectorisable pieces of CPU kernels whose form depends on the element type.

`exp_rows`: the C library's exp is one scalar call per score and costs more than the dot product,
so float32 uses a polynomial that LLVM turns into vector code; float64 keeps the exact call.
`token_row`: float pages are read in place; 16-bit pages are widened into a scratch row first.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

LOG2E = np.float32(1.4426950408889634)
LN2_HI = np.float32(0.693359375)
LN2_LO = np.float32(-2.12194440e-4)
LOWEST = np.float32(-87.0)  # exp of anything below is no longer a normal float32


@register_jitable
def _exp_float32(s, e, n, top):
    """Cephes' expf: split off the power of two, polynomial on the rest; error about 1 ulp."""
    power = e.view(np.float32)
    for j in range(n):
        x = max(s[j] - top, LOWEST)
        e[j] = np.int32(x * LOG2E - np.float32(0.5))  # x <= 0: truncation is rounding here
    for j in range(n):
        x = max(s[j] - top, LOWEST)
        f = np.float32(e[j])
        r = x - f * LN2_HI - f * LN2_LO
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        s[j] = np.float32(0.0) if s[j] - top < LOWEST else p * r * r + r + np.float32(1.0)
        e[j] = (e[j] + np.int32(127)) << np.int32(23)
    for j in range(n):
        s[j] *= power[j]


def exp_rows(s, e, n, top):
    """Replace s[:n] by exp(s - top) and return the sum; `e` is an int32 scratch row."""
    raise NotImplementedError("compiled only")


@overload(exp_rows)
def _exp_rows(s, e, n, top):
    if s.dtype == types.float32:

        def single(s, e, n, top):
            _exp_float32(s, e, n, top)
            total = np.float32(0)
            for j in range(n):
                total += s[j]
            return total

        return single

    def double(s, e, n, top):
        total = 0.0
        for j in range(n):
            s[j] = np.exp(s[j] - top)
            total += s[j]
        return total

    return double


def token_row(pages, first, width, scratch):
    """Give `pages[first : first + width]` as compute floats, in place where they are already."""
    raise NotImplementedError("compiled only")


@overload(token_row)
def _token_row(pages, first, width, scratch):
    if isinstance(pages.dtype, types.Float):

        def direct(pages, first, width, scratch):
            return pages[first : first + width]

        return direct

    if pages.dtype == types.uint16:  # bfloat16: the upper half of a float32

        def bfloat(pages, first, width, scratch):
            bits = scratch.view(np.uint32)
            for x in range(width):
                bits[x] = np.uint32(pages[first + x]) << np.uint32(16)
            return scratch[:width]

        return bfloat

    if pages.dtype == types.int16:  # float16: shift the exponent into place, rebias by 2**112

        def half(pages, first, width, scratch):
            bits = scratch.view(np.uint32)
            for x in range(width):
                h = np.uint32(np.uint16(pages[first + x]))
                bits[x] = (h & np.uint32(0x7FFF)) << np.uint32(13)
            for x in range(width):
                h = np.uint32(np.uint16(pages[first + x]))
                y = scratch[x] * np.float32(5.192296858534828e33)
                if h & np.uint32(0x7C00) == np.uint32(0x7C00):
                    y = np.float32(np.inf) if h & np.uint32(0x3FF) == np.uint32(0) else np.float32(np.nan)
                scratch[x] = -y if h & np.uint32(0x8000) else y
            return scratch[:width]

        return half
    return None


@njit(nogil=True, cache=True)
def widen(pages, scratch):
    """Widen one row; for tests."""
    return token_row(pages, 0, pages.shape[0], scratch)
