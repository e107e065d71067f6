"""Exponentials and logarithms in CPU kernels.

The C library's are one scalar call for each number, and exp costs more than the dot product,
so float32 uses a polynomial that LLVM turns into vector code; float64 keeps the exact calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .kernel_cache import njit

LOG2E = np.float32(1.4426950408889634)
LN2_HI = np.float32(0.693359375)
LN2_LO = np.float32(-2.12194440e-4)
CONTRACT: Any = {"fastmath": {"contract"}}  # a product and a sum rounded once; nothing else
SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
MANTISSA = np.int32(0x007FFFFF)
LOWEST = np.float32(-87.0)  # exp of anything below is no longer a normal float32


def exp_each(s, n, top):
    """Replace s[:n] by exp(s - top), s <= top."""
    raise NotImplementedError("compiled only")


@overload(exp_each, jit_options=CONTRACT)
def _exp_each(s, n, top):
    if s.dtype == types.float32:
        return _exp_float32

    def double(s, n, top):
        for j in range(n):
            s[j] = np.exp(s[j] - top)

    return double


@njit(nogil=True)
def exp_rows(s, n, top):
    """Do what `exp_each` does and return the sum."""
    exp_each(s, n, top)
    total = s.dtype.type(0)
    for j in range(n):
        total += s[j]
    return total


def _exp_float32(s, n, top):
    """Cephes' expf: split off the power of two, polynomial on the rest; error about 1 ulp."""
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


def log_rows(s, n):
    """Replace s[:n] by its logarithm: of normal numbers, for float32; NaN stays."""
    raise NotImplementedError("compiled only")


@overload(log_rows, jit_options=CONTRACT)
def _log_rows(s, n):
    if s.dtype == types.float32:
        return _log_float32

    def double(s, n):
        for j in range(n):
            s[j] = np.log(s[j])

    return double


def _log_float32(s, n):
    """Cephes' logf: the power of two apart, polynomial on a mantissa from sqrt(1/2) to sqrt(2)."""
    one = np.float32(1)
    for j in range(n):
        number = np.float32(s[j])
        bits = np.int32(number.view(np.int32) - SQRT_HALF)
        power = np.int32(bits >> np.int32(23))
        x = np.int32((bits & MANTISSA) + SQRT_HALF).view(np.float32) - one
        p = np.float32(7.0376836292e-2)
        p = p * x - np.float32(1.1514610310e-1)
        p = p * x + np.float32(1.1676998740e-1)
        p = p * x - np.float32(1.2420140846e-1)
        p = p * x + np.float32(1.4249322787e-1)
        p = p * x - np.float32(1.6668057665e-1)
        p = p * x + np.float32(2.0000714765e-1)
        p = p * x - np.float32(2.4999993993e-1)
        p = p * x + np.float32(3.3333331174e-1)
        squared = x * x
        f = np.float32(power)
        y = x * squared * p + f * LN2_LO - np.float32(0.5) * squared
        s[j] = number if number != number else x + y + f * LN2_HI
