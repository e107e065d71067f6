"""Codes of four bits straight to numbers: 32 at once, those of even and of odd places apart until they are rounded.

A byte is two codes, and a word of results two 16-bit floats: nothing is unpacked to memory, and no word is made narrow.
The numbers are those of `int_groups`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from .halves import intrinsic, widen
from .kernel_cache import njit

LANES = 32
HALF = LANES // 2
WORD = ir.IntType(32)
WORDS, FLOATS = ir.VectorType(WORD, HALF), ir.VectorType(ir.FloatType(), HALF)
TOGETHER = [i // 2 + HALF * (i % 2) for i in range(LANES)]  # even and odd places in turn


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Bits whose upper half is the nearest bfloat16, as `narrow_result` rounds."""
    bits = builder.bitcast(value, WORDS)
    odd = builder.and_(builder.lshr(bits, WORDS([16] * HALF)), WORDS([1] * HALF))
    return builder.add(builder.add(bits, WORDS([0x7FFF] * HALF)), odd)


def _joined(builder: Any, even: Any, odd: Any, to: Any) -> Any:
    """Two vectors as 32 elements of a type that `narrow` knows."""
    if to == types.uint16:
        low = builder.lshr(_to_bfloat16(builder, even), WORDS([16] * HALF))
        high = builder.and_(_to_bfloat16(builder, odd), WORDS([0xFFFF0000] * HALF))
        return builder.or_(low, high)
    if to == types.int16:
        halves = ir.VectorType(ir.HalfType(), HALF)
        even, odd = builder.fptrunc(even, halves), builder.fptrunc(odd, halves)
    return builder.shuffle_vector(even, odd, ir.VectorType(WORD, LANES)(TOGETHER))


def _write(
    builder: Any, to: Any, codes: Any, scales: list[Any], lows: list[Any], kind: Any
) -> None:
    """Write `low + code * scale` at address `to`; scales and lows of even and odd places."""
    bytes_ = ir.VectorType(ir.IntType(8), HALF)
    held = builder.load(builder.inttoptr(codes, bytes_.as_pointer()), align=1)
    held = builder.zext(held, WORDS)
    both = builder.and_(held, WORDS([15] * HALF)), builder.lshr(held, WORDS([4] * HALF))
    even, odd = (
        builder.fadd(builder.fmul(builder.sitofp(code, FLOATS), scale), low)
        for code, scale, low in zip(both, scales, lows, strict=True)
    )
    made = _joined(builder, even, odd, kind)
    builder.store(made, builder.inttoptr(to, made.type.as_pointer()), align=1)


@intrinsic
def write_of_one(typingctx, to, codes, scale, low, like):
    """Write 32 elements of `like` at address `to` from the codes at an address, of one scale and low end."""

    def build(context, builder, signature, args):
        nothing = FLOATS(ir.Undefined)
        scale, low = (
            builder.shuffle_vector(
                builder.insert_element(nothing, value, WORD(0)), nothing, WORDS(None)
            )
            for value in args[2:4]
        )
        kind = signature.args[4].dtype
        _write(builder, args[0], args[1], [scale] * 2, [low] * 2, kind)
        return context.get_dummy_value()

    return types.void(to, codes, scale, low, like), build


@intrinsic
def write_of_many(typingctx, to, codes, scales, lows, like):
    """The same with 32 scales and 32 low ends at addresses, float32, those of even places first."""

    def build(context, builder, signature, args):
        both = ir.VectorType(ir.FloatType(), LANES)
        parts = []
        for place in args[2:4]:
            held = builder.load(builder.inttoptr(place, both.as_pointer()), align=1)
            halves = [WORDS(list(range(i, i + HALF))) for i in (0, HALF)]
            parts.append([builder.shuffle_vector(held, held, half) for half in halves])
        _write(builder, args[0], args[1], parts[0], parts[1], signature.args[4].dtype)
        return context.get_dummy_value()

    return types.void(to, codes, scales, lows, like), build


@njit(nogil=True)
def of_rows(codes, group, scales, lows, x):
    """Groups along a row. Shape: codes `[rows, width / 2]`, scales, lows `[rows, groups]`, x `[rows, width]`"""
    rows, width = x.shape
    to, of, at = x.ctypes.data, codes.ctypes.data, 0
    for r in range(rows):
        for g in range(scales.shape[1]):
            scale, low = widen(scales[r, g]), widen(lows[r, g])
            for _ in range(min(group, width - g * group) // LANES):
                write_of_one(to + at * x.itemsize, of + at // 2, scale, low, x)
                at += LANES


@njit(nogil=True)
def _parted(row, wide):
    """Widen a run, of each 32 those of even places first."""
    for first in range(0, row.size, LANES):
        for i in range(HALF):
            wide[first + i] = widen(row[first + 2 * i])
            wide[first + HALF + i] = widen(row[first + 2 * i + 1])


@njit(nogil=True)
def of_columns(codes, scales, lows, x):
    """Groups along a column. Shape: codes `[groups, group, inner / 2]`, scales, lows `[groups, inner]`, x likewise"""
    groups, group, inner = x.shape
    scale, low = np.empty(inner, np.float32), np.empty(inner, np.float32)
    to, of, at = x.ctypes.data, codes.ctypes.data, 0
    for g in range(groups):
        _parted(scales[g], scale)
        _parted(lows[g], low)
        for _ in range(group):
            for c in range(0, inner, LANES):
                s, e = scale.ctypes.data + 4 * c, low.ctypes.data + 4 * c
                write_of_many(to + at * x.itemsize, of + at // 2, s, e, x)
                at += LANES
