"""Exponentials in CPU kernels.

The C library's exp is one scalar call per score and costs more than the dot product,
so float32 uses a polynomial that LLVM turns into vector code; float64 keeps the exact call.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

LOG2E = np.float32(1.4426950408889634)
LN2_HI = np.float32(0.693359375)
LN2_LO = np.float32(-2.12194440e-4)
LOWEST = np.float32(-87.0)  # exp of anything below is no longer a normal float32


def exp_rows(s, n, top):
    """Replace s[:n] by exp(s - top), s <= top, and return the sum."""
    raise NotImplementedError("compiled only")


@overload(exp_rows)
def _exp_rows(s, n, top):
    if s.dtype == types.float32:
        return _exp_float32

    def double(s, n, top):
        total = 0.0
        for j in range(n):
            s[j] = np.exp(s[j] - top)
            total += s[j]
        return total

    return double


def _exp_float32(s, n, top):
    """Cephes' expf: split off the power of two, polynomial on the rest; error about 1 ulp."""
    total = np.float32(0)
    for j in range(n):
        x = s[j] - top
        y = max(x, LOWEST)
        power = np.int32(y * LOG2E - np.float32(0.5))  # y <= 0: truncation is rounding here
        f = np.float32(power)
        r = y - f * LN2_HI - f * LN2_LO
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        s[j] = p * np.int32(np.int32(power + np.int32(127)) << np.int32(23)).view(np.float32)
        if x < LOWEST:
            s[j] = np.float32(0)
    for j in range(n):
        total += s[j]
    return total
