"""Floats of four to eight bits: round to nearest even, saturate, and back, bit for bit those of ml_dtypes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .halves import widen
from .kernel_cache import njit


class Minifloat(NamedTuple):
    """A sign, an exponent with subnormals, a mantissa."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    infinities: bool = False  # as IEEE has them; else the codes after `largest`, if any, are NaN

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def top_exponent(self) -> int:
        """Exponent of the largest power of two in it."""
        return int(np.frexp(self.largest)[1]) - 1


MINIFLOATS = {
    "e4m3": Minifloat(4, 3, 7, 448.0),
    "e5m2": Minifloat(5, 2, 15, 57344.0, infinities=True),
    "e3m2": Minifloat(3, 2, 3, 28.0),
    "e2m3": Minifloat(2, 3, 1, 7.5),
    "e2m1": Minifloat(2, 1, 1, 6.0),
}


@lru_cache
def float16_of(form: str) -> tuple[np.int16, np.int16, np.int16, np.int16, np.float32]:
    """Say how `widen_code` makes a float16 of a code; the last number is what its value is to be multiplied by."""
    kind = MINIFLOATS[form]
    top = np.float16(kind.largest / 2.0 ** (15 - kind.bias)).view(np.int16)
    return (
        np.int16(1 << (10 - kind.mantissa_bits)), np.int16((1 << (10 + kind.exponent_bits)) - 1),
        np.int16(1 << (16 - kind.bits)),
        np.int16(0x7FFF) if kind.infinities else top, np.float32(2.0 ** (15 - kind.bias)),
    )  # fmt: skip


@njit(nogil=True)
def widen_code(code, lift, size_bits, sign_lift, top):
    """Give a code's value as float32, less the difference of the biases; codes beyond the largest are NaN.

    Exponent and sign move to their places in a float16, which has subnormals too: unlike a look-up it becomes vector
    code, if shifts are products (Numba shifts in 64 bits).
    """
    size = np.int16(np.int16(np.int16(code) * lift) & size_bits)
    sign = np.int16(np.int16(np.int16(code) * sign_lift) & np.int16(-0x8000))
    size = np.int16(0x7E00) if size > top else size
    return widen(np.int16(size | sign))


@lru_cache
def table_of(form: str) -> np.ndarray:
    """Give the value of every code. Shape: `[2 ** bits]` float32"""
    kind = MINIFLOATS[form]
    codes = np.arange(1 << kind.bits)
    mantissa = codes & ((1 << kind.mantissa_bits) - 1)
    exponent = codes >> kind.mantissa_bits & ((1 << kind.exponent_bits) - 1)
    whole = np.where(exponent > 0, mantissa + (1 << kind.mantissa_bits), mantissa)
    size = np.ldexp(
        whole.astype(np.float64), np.maximum(exponent, 1) - kind.bias - kind.mantissa_bits
    )
    beyond = np.where(kind.infinities & (mantissa == 0), np.inf, np.nan)
    size = np.where(size > kind.largest, beyond, size)
    table = np.where(codes >> (kind.bits - 1), -size, size).astype(np.float32)
    table.flags.writeable = True
    return table


@lru_cache
def rounding_of(form: str) -> tuple[np.int32, ...]:
    """Say how `round_to` rounds to a format."""
    kind = MINIFLOATS[form]
    return tuple(
        np.int32(number) for number in (
            128 - kind.bias, np.float32(kind.largest).view(np.int32), 254 + kind.mantissa_bits,
            1 << kind.mantissa_bits, 1 << (kind.bits - 1),
        )
    )  # fmt: skip


@njit(nogil=True)
def round_to(value, lowest, largest, lift, unit, sign):
    """Give the code of a float32; beyond the largest it saturates, a NaN too. Products, for Numba shifts in 64 bits.

    Args:
        lowest: exponent field of float32 for the format's smallest normal number.
        largest: bits of the largest number.
    """
    bits = np.int32(np.float32(value).view(np.int32))
    size = np.int32(bits & np.int32(0x7FFFFFFF))
    size = np.int32(size if size < largest else largest)
    field = np.int32(size >> np.int32(23))
    field = np.int32(field if field > lowest else lowest)
    inverse = np.int32(np.int32(lift - field) << np.int32(23)).view(np.float32)
    steps = np.int32(np.rint(np.int32(size).view(np.float32) * inverse))
    code = np.int32(steps + np.int32(np.int32(field - lowest) * unit))
    return np.uint8(np.int32(code | np.int32(np.int32(bits >> np.int32(31)) & sign)))
