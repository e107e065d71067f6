"""Blocks of whole numbers with a shared power of two: block floating point, MXINT8, and shared microexponents.

Source: OCP MX v1.0 (MXINT8 is 8 bits in blocks of 32); shared microexponents, arXiv 2302.08007 (blocks of 16, whose
pairs may have one exponent less). Blocks lie along the last dim; the last one of a row may be shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bits import pack_tiles, unpack_tiles
from .block_runs import (
    RUN,
    clear_blocks,
    keep,
    power,
    spread,
    whole_blocks,
    widen_all,
    worst_of_blocks,
)
from .halves import narrow_result
from .numbers import bits_of

NAN_SCALE = 255
INFINITE = np.int32(0x7F800000)
MICRO_BLOCK = 16


@njit(nogil=True, cache=True)
def _fields(worst, scales):
    """Give exponent fields of blocks: 255 if one is NaN, infinities count as 254; and how many are NaN."""
    odd = 0
    for b in range(worst.size):
        field = np.int32(min(np.int32(worst[b] >> np.int32(23)), np.int32(254)))
        nan = worst[b] > INFINITE
        scales[b] = np.uint8(NAN_SCALE) if nan else np.uint8(field)
        odd += nan
    return odd


@njit(nogil=True, cache=True)
def _round_signed(wide, steps, top, mask, codes):
    for i in range(wide.size):
        whole = min(max(np.rint(wide[i] * steps[i]), -top), top)
        codes[i] = np.uint8(np.int32(whole) & mask)


@njit(nogil=True, cache=True)
def _quantise_blocks(x, size, bits, scales, codes):
    """Shape: x, codes `[blocks * size]`, scales `[blocks]`: exponent of the largest element, bias 127."""
    many = max(1, RUN // size)
    wide, steps = np.empty(many * size, np.float32), np.empty(many * size, np.float32)
    worst, factors = np.empty(many, np.int32), np.empty(many, np.float32)
    top, mask = np.float32((1 << (bits - 1)) - 1), np.int32((1 << bits) - 1)
    for first in range(0, scales.size, many):
        last = min(first + many, scales.size)
        a, b, blocks = first * size, last * size, last - first
        widen_all(x[a:b], wide)
        worst_of_blocks(wide, size, worst[:blocks])
        if _fields(worst[:blocks], scales[first:last]):
            clear_blocks(worst[:blocks], size, wide)
        for block in range(blocks):
            step = max(np.int32(scales[first + block]) - (bits - 2), 1)
            factors[block] = power(max(254 - step, 0))
        spread(factors[:blocks], size, steps)
        _round_signed(wide[: b - a], steps, top, mask, codes[a:b])


@njit(nogil=True, cache=True)
def _widen_signed(codes, half, steps, x):
    for i in range(codes.size):
        whole = np.int32(np.int32(np.int32(codes[i]) ^ half) - half)
        x[i] = narrow_result(np.float32(whole) * steps[i], x)


@njit(nogil=True, cache=True)
def _dequantise_blocks(codes, size, bits, scales, x):
    many, half = max(1, RUN // size), np.int32(1 << (bits - 1))
    steps, factors = np.empty(many * size, np.float32), np.empty(many, np.float32)
    for first in range(0, scales.size, many):
        last = min(first + many, scales.size)
        a, b = first * size, last * size
        for block in range(last - first):
            field = np.int32(scales[first + block])
            value = power(max(field - (bits - 2), 1))
            factors[block] = np.float32(np.nan) if field == NAN_SCALE else value
        spread(factors[: last - first], size, steps)
        _widen_signed(codes[a:b], half, steps, x[a:b])


@njit(nogil=True, cache=True)
def _lesser_pairs(wide, fields, less):
    """Say which pairs have a smaller exponent than their block. Shape: less `[pairs]`, 0 or 1"""
    for i in range(less.size):
        a = np.int32(np.int32(np.float32(wide[2 * i]).view(np.int32)) & np.int32(0x7FFFFFFF))
        b = np.int32(np.int32(np.float32(wide[2 * i + 1]).view(np.int32)) & np.int32(0x7FFFFFFF))
        less[i] = np.int32(max(a, b) >> np.int32(23)) < fields[i]


@njit(nogil=True, cache=True)
def _pair_steps(fields, less, magnitude, back, steps):
    """Give each element what it is multiplied by on the way back, or its inverse."""
    for i in range(less.size):
        field = np.int32(max(np.int32(fields[i] - np.int32(less[i]) - magnitude), np.int32(1)))
        value = power(np.int32(min(field, np.int32(254)) if back else np.int32(254) - field))
        steps[2 * i] = value
        steps[2 * i + 1] = value


@njit(nogil=True, cache=True)
def _round_sizes(wide, steps, top, sign, codes):
    for i in range(wide.size):
        bits = np.int32(np.float32(wide[i]).view(np.int32))
        size = np.int32(min(np.rint(abs(wide[i]) * steps[i]), top))
        codes[i] = np.uint8(np.int32(size | np.int32(np.int32(bits >> np.int32(31)) & sign)))


@njit(nogil=True, cache=True)
def _bytes_of_bits(bits, out):
    for i in range(out.size):
        byte = np.uint8(0)
        for j in range(8):
            byte |= np.uint8(bits[8 * i + j] << j)
        out[i] = byte


@njit(nogil=True, cache=True)
def _bits_of_bytes(data, bits):
    for i in range(data.size):
        for j in range(8):
            bits[8 * i + j] = np.uint8(np.uint8(data[i] >> j) & np.uint8(1))


@njit(nogil=True, cache=True)
def _quantise_micro(x, magnitude, scales, pairs, codes):
    """Shape: x, codes `[blocks * 16]`, scales, pairs `[blocks]` uint8; a pair's bit: one exponent less."""
    many = RUN // MICRO_BLOCK
    wide, steps = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    worst, fields = np.empty(many, np.int32), np.empty(RUN // 2, np.int32)
    less = np.empty(RUN // 2, np.uint8)
    top, sign = np.float32((1 << magnitude) - 1), np.int32(1 << magnitude)
    for first in range(0, scales.size, many):
        last = min(first + many, scales.size)
        a, b, blocks = first * MICRO_BLOCK, last * MICRO_BLOCK, last - first
        widen_all(x[a:b], wide)
        worst_of_blocks(wide, MICRO_BLOCK, worst[:blocks])
        if _fields(worst[:blocks], scales[first:last]):
            clear_blocks(worst[:blocks], MICRO_BLOCK, wide)
        spread(scales[first:last], MICRO_BLOCK // 2, fields)
        run = less[: (b - a) // 2]
        _lesser_pairs(wide, fields, run)
        _bytes_of_bits(run, pairs[first:last])
        _pair_steps(fields, run, np.int32(magnitude - 1), False, steps)
        _round_sizes(wide[: b - a], steps, top, sign, codes[a:b])


@njit(nogil=True, cache=True)
def _widen_sizes(codes, mask, steps, x):
    for i in range(codes.size):
        code = np.int32(codes[i])
        size = np.float32(np.int32(code & mask)) * steps[i]
        x[i] = narrow_result(-size if code > mask else size, x)


@njit(nogil=True, cache=True)
def _dequantise_micro(codes, magnitude, scales, pairs, x):
    many, mask = RUN // MICRO_BLOCK, np.int32((1 << magnitude) - 1)
    steps, fields = np.empty(RUN, np.float32), np.empty(RUN // 2, np.int32)
    less = np.empty(RUN // 2, np.uint8)
    for first in range(0, scales.size, many):
        last = min(first + many, scales.size)
        a, b = first * MICRO_BLOCK, last * MICRO_BLOCK
        spread(scales[first:last], MICRO_BLOCK // 2, fields)
        run = less[: (b - a) // 2]
        _bits_of_bytes(pairs[first:last], run)
        _pair_steps(fields, run, np.int32(magnitude - 1), True, steps)
        for block in range(last - first):
            if scales[first + block] == NAN_SCALE:
                steps[block * MICRO_BLOCK : (block + 1) * MICRO_BLOCK] = np.nan
        _widen_sizes(codes[a:b], mask, steps, x[a:b])


def quantise_blocks_into(
    x: Tensor, bits: int, size: int, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes (two's complement).

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / size)]`, codes `[rows, packed_width]` uint8
    """
    source = bits_of(x)

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(source[a:b], size), whole_blocks(tile, size)
        _quantise_blocks(rows.reshape(-1), size, bits, scales[a:b].reshape(-1), room.reshape(-1))
        keep(room, tile)

    pack_tiles(quantise, source.shape, bits, codes)


def dequantise_blocks_into(
    scales: np.ndarray, codes: np.ndarray, bits: int, size: int, x: Tensor
) -> None:
    """Undo `quantise_blocks_into`; a block of scale 255 is NaN."""
    target = bits_of(x)

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(tile, size), whole_blocks(target[a:b], size)
        _dequantise_blocks(rows.reshape(-1), size, bits, scales[a:b].reshape(-1), room.reshape(-1))
        keep(room, target[a:b])

    unpack_tiles(dequantise, target.shape, bits, codes)


def quantise_micro_into(
    x: Tensor, magnitude: int, scales: np.ndarray, pairs: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows to shared microexponents of so many bits of magnitude, and a sign above them."""
    source = bits_of(x)

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(source[a:b], MICRO_BLOCK), whole_blocks(tile, MICRO_BLOCK)
        parts = (scales[a:b].reshape(-1), pairs[a:b].reshape(-1))
        _quantise_micro(rows.reshape(-1), magnitude, *parts, room.reshape(-1))
        keep(room, tile)

    pack_tiles(quantise, source.shape, magnitude + 1, codes)


def dequantise_micro_into(
    scales: np.ndarray, pairs: np.ndarray, codes: np.ndarray, magnitude: int, x: Tensor
) -> None:
    """Undo `quantise_micro_into`."""
    target = bits_of(x)

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(tile, MICRO_BLOCK), whole_blocks(target[a:b], MICRO_BLOCK)
        parts = (scales[a:b].reshape(-1), pairs[a:b].reshape(-1))
        _dequantise_micro(rows.reshape(-1), magnitude, *parts, room.reshape(-1))
        keep(room, target[a:b])

    unpack_tiles(dequantise, target.shape, magnitude + 1, codes)


def micro_reference(x: Tensor, magnitude: int) -> Tensor:
    """Round to shared microexponents and back, in float64. Shape: `[rows, width]`, width a multiple of 16."""
    blocks = x.double().unflatten(-1, (-1, 8, 2))
    exponent = torch.frexp(blocks.abs().amax((-1, -2), keepdim=True)).exponent - 1
    own = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1
    step = torch.exp2((exponent - (own < exponent).int() - magnitude + 1).double())
    whole = (blocks.abs() / step).round().clamp(max=2**magnitude - 1)
    return (whole * step * blocks.sign()).flatten(-3)


def blocks_reference(x: Tensor, bits: int, size: int) -> Tensor:
    """Round to block floating point and back, in float64. Shape: `[rows, width]`, width a multiple of size."""
    blocks = x.double().unflatten(-1, (-1, size))
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1
    step = torch.exp2((exponent - (bits - 2)).double())
    top = 2 ** (bits - 1) - 1
    return ((blocks / step).round().clamp(-top, top) * step).flatten(-2)


# inlines block_runs.py and halves.py d6c49f44
