"""Codes of two bits straight to numbers: a group has four of them, and vectors of 32 choose.

Each number is `low + code * scale`, rounded as `int_groups` rounds it, made once for a group; nothing is unpacked,
widened or rounded again. Written as vectors: LLVM makes none of look-ups in a table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from .halves import narrow_result, widen
from .kernel_cache import njit
from .vectors import intrinsic, ints, load, same, shuffled, spread, store, vector

LANES = 32
GROUPS = 1024  # whose numbers are made at once


def _choose(builder: Any, codes: Any, values: list[Any]) -> Any:
    """Choose among four vectors by the 32 codes at an address."""
    lanes = ints(8, LANES)
    held = load(builder, codes, ints(8, LANES // 4))
    held = shuffled(builder, [i // 4 for i in range(LANES)], held)
    picked = (lanes([bit << 2 * (i % 4) for i in range(LANES)]) for bit in (1, 2))
    low, high = (
        builder.icmp_unsigned("!=", builder.and_(held, bits), same(lanes, 0)) for bits in picked
    )
    upper, lower = builder.select(low, values[3], values[2]), builder.select(low, *values[1::-1])
    return builder.select(high, upper, lower)


@intrinsic
def choose_of_four(typingctx, to, codes, a, b, c, d):
    """Write 32 numbers at address `to`: each a, b, c or d by the code at address `codes`."""

    def build(context, builder, signature, args):
        kind = vector(context.get_value_type(signature.args[2]), LANES)
        values = [spread(builder, value, kind) for value in args[2:]]
        store(builder, args[0], _choose(builder, args[1], values))
        return context.get_dummy_value()

    return types.void(to, codes, a, b, c, d), build


@intrinsic
def choose_of_many(typingctx, to, codes, table, apart, like):
    """The same of four rows of elements of `like`, `apart` bytes from each other."""

    def build(context, builder, signature, args):
        kind = vector(context.get_value_type(signature.args[4].dtype), LANES)
        rows = []
        place = args[2]
        for _ in range(4):
            rows.append(load(builder, place, kind))
            place = builder.add(place, args[3])
        store(builder, args[0], _choose(builder, args[1], rows))
        return context.get_dummy_value()

    return types.void(to, codes, table, apart, like), build


@njit(nogil=True)
def _value_row(code, scales, lows, row):
    for c in range(row.size):
        row[c] = narrow_result(np.float32(code) * widen(scales[c]) + widen(lows[c]), row)


@njit(nogil=True)
def of_rows(codes, group, scales, lows, x):
    """Groups along a row. Shape: codes `[rows, width / 4]`, scales, lows `[rows, groups]`, x `[rows, width]`"""
    (rows, width), groups = x.shape, scales.shape[1]
    step = max(1, GROUPS // groups)
    table = np.empty((4, step * groups), x.dtype)
    to, of = x.ctypes.data, codes.ctypes.data
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        count = (stop - first) * groups
        for code in range(4):
            s, low = scales[first:stop].reshape(-1), lows[first:stop].reshape(-1)
            _value_row(code, s, low, table[code, :count])
        own, at = 0, first * width
        for _ in range(first, stop):
            for g in range(groups):
                a, b, c, d = table[0, own], table[1, own], table[2, own], table[3, own]
                own += 1
                for _ in range(min(group, width - g * group) // LANES):
                    choose_of_four(to + at * x.itemsize, of + at // 4, a, b, c, d)
                    at += LANES


@njit(nogil=True)
def of_columns(codes, scales, lows, x):
    """Groups along a column. Shape: codes `[groups, group, inner / 4]`, scales, lows `[groups, inner]`, x likewise"""
    groups, group, inner = x.shape
    table = np.empty((4, inner), x.dtype)
    to, of, values = x.ctypes.data, codes.ctypes.data, table.ctypes.data
    for g in range(groups):
        for code in range(4):
            _value_row(code, scales[g], lows[g], table[code])
        for t in range(group):
            for c in range(0, inner, LANES):
                at = (g * group + t) * inner + c
                place = values + c * x.itemsize
                choose_of_many(to + at * x.itemsize, of + at // 4, place, inner * x.itemsize, x)
