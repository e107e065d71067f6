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
from .halves import narrow
from .numbers import bits_of, widen_run

NAN_SCALE = 255
MICRO_BLOCK = 16


@njit(nogil=True, cache=True)
def _field(row, wide):
    """Widen a run; give the exponent field of its largest magnitude, 255 if one is NaN; infinities count as 254."""
    worst = np.int64(widen_run(row, wide))
    if worst > 0x7F800000:
        return NAN_SCALE
    return min(worst >> 23, 254)


@njit(nogil=True, cache=True)
def _power(field):
    """2 ** (field - 127) for a field of 0 to 254; 0 is the subnormal 2 ** -127."""
    return np.uint32(field << 23 if field > 0 else 0x00400000).view(np.float32)


@njit(nogil=True, cache=True)
def _round_signed(wide, factor, top, mask, codes):
    for i in range(wide.size):
        whole = min(max(np.rint(wide[i] * factor), -top), top)
        codes[i] = np.uint8(np.int32(whole) & mask)


@njit(nogil=True, cache=True)
def _quantise_blocks(x, size, bits, scales, codes):
    """Shape: x, codes `[rows, width]`, scales `[rows, blocks]`: exponent of the largest element, bias 127."""
    rows, width = x.shape
    wide = np.empty(size, np.float32)
    top, mask = np.float32((1 << (bits - 1)) - 1), np.int32((1 << bits) - 1)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * size, min((b + 1) * size, width)
            field = _field(x[r, start:stop], wide[: stop - start])
            scales[r, b] = field
            if field == NAN_SCALE:
                codes[r, start:stop] = 0
            else:
                step = max(field - (bits - 2), 1)
                _round_signed(
                    wide[: stop - start], _power(254 - step), top, mask, codes[r, start:stop]
                )


@njit(nogil=True, cache=True)
def _dequantise_blocks(codes, size, bits, scales, x):
    rows, width = codes.shape
    shift = np.uint32(32 - bits)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * size, min((b + 1) * size, width)
            field = np.int64(scales[r, b])
            scale = np.float32(np.nan) if field == NAN_SCALE else _power(max(field - (bits - 2), 1))
            run, out = codes[r, start:stop], x[r, start:stop]
            for i in range(run.size):
                whole = np.uint32(np.uint32(run[i]) << shift).view(np.int32) >> np.int32(shift)
                out[i] = narrow(np.float32(np.int32(whole)) * scale, x)


@njit(nogil=True, cache=True)
def _quantise_micro(x, magnitude, scales, pairs, codes):
    """Shape: x, codes `[rows, width]`, scales, pairs `[rows, blocks]` uint8; a pair's bit: one exponent less."""
    rows, width = x.shape
    wide = np.empty(MICRO_BLOCK, np.float32)
    top = np.float32((1 << magnitude) - 1)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * MICRO_BLOCK, min((b + 1) * MICRO_BLOCK, width)
            field = _field(x[r, start:stop], wide[: stop - start])
            scales[r, b] = field
            less = np.uint8(0)
            for i in range(0, stop - start, 2):
                pair = max(abs(wide[i]), abs(wide[min(i + 1, stop - start - 1)]))
                own = np.int64(np.float32(pair).view(np.uint32) >> np.uint32(23))
                low = 1 if own < field else 0
                less = np.uint8(less | (low << (i >> 1)))
                factor = _power(254 - max(field - low - magnitude + 1, 1))
                for j in range(start + i, min(start + i + 2, stop)):
                    if field == NAN_SCALE:
                        codes[r, j] = 0
                        continue
                    value = wide[j - start]
                    sign = np.float32(value).view(np.uint32) >> np.uint32(31)
                    size = np.uint32(min(np.rint(abs(value) * factor), top))
                    codes[r, j] = np.uint8(size | sign << np.uint32(magnitude))
            pairs[r, b] = less


@njit(nogil=True, cache=True)
def _dequantise_micro(codes, magnitude, scales, pairs, x):
    rows, width = codes.shape
    mask = np.int32((1 << magnitude) - 1)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * MICRO_BLOCK, min((b + 1) * MICRO_BLOCK, width)
            field = np.int64(scales[r, b])
            high = _power(min(max(field - magnitude + 1, 1), 254))
            low = _power(min(max(field - magnitude, 1), 254))
            if field == NAN_SCALE:
                high = low = np.float32(np.nan)
            for j in range(start, stop):
                code = np.int32(codes[r, j])
                scale = low if pairs[r, b] >> ((j - start) >> 1) & 1 else high
                size = np.float32(np.int32(code & mask)) * scale
                x[r, j] = narrow(-size if code > mask else size, x)


def quantise_blocks_into(
    x: Tensor, bits: int, size: int, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes (two's complement).

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / size)]`, codes `[rows, packed_width]` uint8
    """
    source = bits_of(x)

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        _quantise_blocks(source[a:b], size, bits, scales[a:b], tile)

    pack_tiles(quantise, source.shape, bits, codes)


def dequantise_blocks_into(
    scales: np.ndarray, codes: np.ndarray, bits: int, size: int, x: Tensor
) -> None:
    """Undo `quantise_blocks_into`; a block of scale 255 is NaN."""
    target = bits_of(x)

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        _dequantise_blocks(tile, size, bits, scales[a:b], target[a:b])

    unpack_tiles(dequantise, target.shape, bits, codes)


def quantise_micro_into(
    x: Tensor, magnitude: int, scales: np.ndarray, pairs: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows to shared microexponents of so many bits of magnitude, and a sign above them."""
    source = bits_of(x)

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        _quantise_micro(source[a:b], magnitude, scales[a:b], pairs[a:b], tile)

    pack_tiles(quantise, source.shape, magnitude + 1, codes)


def dequantise_micro_into(
    scales: np.ndarray, pairs: np.ndarray, codes: np.ndarray, magnitude: int, x: Tensor
) -> None:
    """Undo `quantise_micro_into`."""
    target = bits_of(x)

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        _dequantise_micro(tile, magnitude, scales[a:b], pairs[a:b], target[a:b])

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


# inlines halves.py and numbers.py 7ce133ae
