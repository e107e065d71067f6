"""Blocks of whole numbers with a shared power of two: block floating point, and MXINT8.

Source: OCP MX v1.0 (MXINT8 is 8 bits in blocks of 32). Blocks lie along the last dim; the last one of a row may be
shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .block_floats import fits, rooms
from .block_ints_gpu import dequantise_blocks_launch, quantise_blocks_launch, serves
from .block_runs import (
    RUN,
    clear_blocks,
    pack_blocks,
    power,
    spread,
    unpack_blocks,
    widen_all,
    worst_of_blocks,
)
from .gpu.kernel import run_on
from .halves import narrow_result
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .numbers import bits_of

NAN_SCALE = 255
INFINITE = np.int32(0x7F800000)


@njit(nogil=True)
def _fields(worst, scales):
    """Give exponent fields of blocks: 255 if one is NaN, infinities count as 254; and how many are NaN."""
    odd = 0
    for b in range(worst.size):
        field = np.int32(min(np.int32(worst[b] >> np.int32(23)), np.int32(254)))
        nan = worst[b] > INFINITE
        scales[b] = np.uint8(NAN_SCALE) if nan else np.uint8(field)
        odd += nan
    return odd


@njit(nogil=True)
def fields_of(x, size, wide, worst, scales):
    """Widen blocks and find their exponent fields; blocks with a NaN become zeros. Shape: worst, scales `[blocks]`"""
    widen_all(x, wide)
    worst_of_blocks(wide, size, worst)
    if _fields(worst, scales):
        clear_blocks(worst, size, wide)


@njit(nogil=True)
def _round_signed(wide, steps, top, mask, codes):
    for i in range(wide.size):
        whole = min(max(np.rint(wide[i] * steps[i]), -top), top)
        codes[i] = np.uint8(np.int32(whole) & mask)


@njit(nogil=True)
def _quantise_blocks(x, size, bits, scales, codes):
    """Shape: x, codes `[blocks * size]`, scales `[blocks]`: exponent of the largest element, bias 127."""
    many = max(1, RUN // size)
    wide, steps = np.empty(many * size, np.float32), np.empty(many * size, np.float32)
    worst, factors = np.empty(many, np.int32), np.empty(many, np.float32)
    top, mask = np.float32((1 << (bits - 1)) - 1), np.int32((1 << bits) - 1)
    for first in range(0, scales.size, many):
        last = min(first + many, scales.size)
        a, b, blocks = first * size, last * size, last - first
        fields_of(x[a:b], size, wide, worst[:blocks], scales[first:last])
        for block in range(blocks):
            step = max(np.int32(scales[first + block]) - (bits - 2), 1)
            factors[block] = power(max(254 - step, 0))
        spread(factors[:blocks], size, steps)
        _round_signed(wide[: b - a], steps, top, mask, codes[a:b])


@njit(nogil=True)
def _widen_signed(codes, half, steps, x):
    for i in range(codes.size):
        whole = np.int32(np.int32(np.int32(codes[i]) ^ half) - half)
        x[i] = narrow_result(np.float32(whole) * steps[i], x)


@njit(nogil=True)
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


def quantise_blocks_into(
    x: Tensor, bits: int, size: int, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes (two's complement).

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / size)]`, codes `[rows, packed_width]` uint8
    """

    def quantise(which: slice, rows: np.ndarray, found: np.ndarray) -> None:
        _quantise_blocks(rows, size, bits, scales[which].reshape(-1), found)

    pack_blocks(quantise, bits_of(x), size, bits, codes)


def dequantise_blocks_into(
    scales: np.ndarray, codes: np.ndarray, bits: int, size: int, x: Tensor
) -> None:
    """Undo `quantise_blocks_into`; a block of scale 255 is NaN."""

    def dequantise(which: slice, found: np.ndarray, rows: np.ndarray) -> None:
        _dequantise_blocks(found, size, bits, scales[which].reshape(-1), rows)

    unpack_blocks(dequantise, codes, size, bits, bits_of(x))


def blocks_reference(x: Tensor, bits: int, size: int) -> Tensor:
    """Round to block floating point and back, in float64. Shape: `[rows, width]`, width a multiple of size."""
    blocks = x.double().unflatten(-1, (-1, size))
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1
    step = torch.exp2((exponent - (bits - 2)).double())
    top = 2 ** (bits - 1) - 1
    return ((blocks / step).round().clamp(-top, top) * step).flatten(-2)


@torch.library.custom_op("plait::quantise_blocks", mutates_args=())
def quantise_blocks(x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Quantise rows to whole numbers of 2 to 8 bits with an exponent for each block of `size`.

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / size)]` (exponents, bias 127; 255 is NaN),
        codes `[rows, packed_width]`, both uint8
    """
    (scales, codes), _ = coded_on_host(
        lambda x, *parts: quantise_blocks_into(x, bits, size, *parts), x, rooms(x, size, bits)
    )
    return scales, codes


@quantise_blocks.register_fake
def _(x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    return rooms(x, size, bits)


@torch.library.custom_op("plait::dequantise_blocks", mutates_args=())
def dequantise_blocks(
    scales: Tensor, codes: Tensor, bits: int, size: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_blocks`. Shape: -> `[rows, width]` of the dtype"""
    return decoded_on_host(
        lambda s, c, x: dequantise_blocks_into(s, c, bits, size, x),
        (scales, codes), (codes.shape[0], width), dtype,
    )  # fmt: skip


@dequantise_blocks.register_fake
def _(
    scales: Tensor, codes: Tensor, bits: int, size: int, width: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@quantise_blocks.register_kernel("cuda")
def quantise_blocks_cuda(x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Quantise whole blocks in one launch; what the kernel does not serve goes by way of the host."""
    x = x.contiguous()
    if not fits(x, x, serves(x.dtype, x.shape[-1], bits, size)):
        return by_way_of_host(quantise_blocks, [x], bits, size)
    scales, codes = rooms(x, size, bits)
    run_on(quantise_blocks_launch(x, bits, size, scales, codes), x)
    return scales, codes


@dequantise_blocks.register_kernel("cuda")
def dequantise_blocks_cuda(
    scales: Tensor, codes: Tensor, bits: int, size: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, c = scales.contiguous(), codes.contiguous()
    x = c.new_empty(c.shape[0], width, dtype=dtype)
    if not fits(x, c, serves(dtype, width, bits, size)):
        return by_way_of_host(dequantise_blocks, [s, c], bits, size, width, dtype)
    run_on(dequantise_blocks_launch(s, c, bits, size, x), c)
    return x
