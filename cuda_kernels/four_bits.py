"""Codes of four bits straight to numbers: 32 at once, those of even and of odd places apart until they are rounded.

A byte is two codes, and a word of results two 16-bit floats: nothing is unpacked to memory, and no word is made narrow.
The numbers are those of `int_groups`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from .halves import widen
from .kernel_cache import njit
from .vectors import floats, intrinsic, ints, joined, load, same, shuffled, spread, store

LANES = 32
PLACES = LANES // 2  # even ones, or odd
WORDS, FLOATS = ints(32, PLACES), floats(32, PLACES)
TOGETHER = [i // 2 + PLACES * (i % 2) for i in range(LANES)]  # even and odd places in turn


def _elements(builder: Any, even: Any, odd: Any, to: Any) -> Any:
    """Two vectors as 32 elements of a type that `narrow` knows."""
    if to == types.uint16:
        return joined(builder, even, odd)
    if to == types.int16:
        even, odd = (builder.fptrunc(part, floats(16, PLACES)) for part in (even, odd))
    return shuffled(builder, TOGETHER, even, odd)


def _write(
    builder: Any, to: Any, codes: Any, scales: list[Any], lows: list[Any], kind: Any
) -> None:
    """Write `low + code * scale` at address `to`; scales and lows of even and odd places."""
    held = builder.zext(load(builder, codes, ints(8, PLACES)), WORDS)
    both = builder.and_(held, same(WORDS, 15)), builder.lshr(held, same(WORDS, 4))
    even, odd = (
        builder.fadd(builder.fmul(builder.sitofp(code, FLOATS), scale), low)
        for code, scale, low in zip(both, scales, lows, strict=True)
    )
    store(builder, to, _elements(builder, even, odd, kind))


@intrinsic
def write_of_one(typingctx, to, codes, scale, low, like):
    """Write 32 elements of `like` at address `to` from the codes at an address, of one scale and low end."""

    def build(context, builder, signature, args):
        scale, low = (spread(builder, value, FLOATS) for value in args[2:4])
        kind = signature.args[4].dtype
        _write(builder, args[0], args[1], [scale] * 2, [low] * 2, kind)
        return context.get_dummy_value()

    return types.void(to, codes, scale, low, like), build


@intrinsic
def write_of_many(typingctx, to, codes, scales, lows, like):
    """The same with 32 scales and 32 low ends at addresses, float32, those of even places first."""

    def build(context, builder, signature, args):
        parts = []
        for place in args[2:4]:
            held = load(builder, place, floats(32, LANES))
            halves = (range(i, i + PLACES) for i in (0, PLACES))
            parts.append([shuffled(builder, half, held) for half in halves])
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
        for i in range(PLACES):
            wide[first + i] = widen(row[first + 2 * i])
            wide[first + PLACES + i] = widen(row[first + 2 * i + 1])


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
