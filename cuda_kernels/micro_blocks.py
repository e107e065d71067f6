"""Shared microexponents: blocks of 16 sizes with a power of two, whose pairs may have one exponent less.

Source: "With Shared Microexponents, A Little Shifting Goes a Long Way" (arXiv 2302.08007). Blocks lie along the last
dim; the last one of a row may be shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .block_floats import fits, rooms
from .block_ints import NAN_SCALE, fields_of
from .block_ints_gpu import MICRO_BLOCK, dequantise_micro_launch, quantise_micro_launch, serves
from .block_runs import RUN, pack_blocks, power, spread, unpack_blocks
from .gpu.kernel import run_on
from .halves import narrow_result
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .numbers import bits_of


@njit(nogil=True)
def _lesser_pairs(wide, fields, less):
    """Say which pairs have a smaller exponent than their block. Shape: less `[pairs]`, 0 or 1"""
    for i in range(less.size):
        a = np.int32(np.int32(np.float32(wide[2 * i]).view(np.int32)) & np.int32(0x7FFFFFFF))
        b = np.int32(np.int32(np.float32(wide[2 * i + 1]).view(np.int32)) & np.int32(0x7FFFFFFF))
        less[i] = np.int32(max(a, b) >> np.int32(23)) < fields[i]


@njit(nogil=True)
def _pair_steps(fields, less, magnitude, back, steps):
    """Give each element what it is multiplied by on the way back, or its inverse."""
    for i in range(less.size):
        field = np.int32(max(np.int32(fields[i] - np.int32(less[i]) - magnitude), np.int32(1)))
        value = power(np.int32(min(field, np.int32(254)) if back else np.int32(254) - field))
        steps[2 * i] = value
        steps[2 * i + 1] = value


@njit(nogil=True)
def _round_sizes(wide, steps, top, sign, codes):
    for i in range(wide.size):
        bits = np.int32(np.float32(wide[i]).view(np.int32))
        size = np.int32(min(np.rint(abs(wide[i]) * steps[i]), top))
        codes[i] = np.uint8(np.int32(size | np.int32(np.int32(bits >> np.int32(31)) & sign)))


@njit(nogil=True)
def _bytes_of_bits(bits, out):
    for i in range(out.size):
        byte = np.uint8(0)
        for j in range(8):
            byte |= np.uint8(bits[8 * i + j] << j)
        out[i] = byte


@njit(nogil=True)
def _bits_of_bytes(data, bits):
    for i in range(data.size):
        for j in range(8):
            bits[8 * i + j] = np.uint8(np.uint8(data[i] >> j) & np.uint8(1))


@njit(nogil=True)
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
        fields_of(x[a:b], MICRO_BLOCK, wide, worst[:blocks], scales[first:last])
        spread(scales[first:last], MICRO_BLOCK // 2, fields)
        run = less[: (b - a) // 2]
        _lesser_pairs(wide, fields, run)
        _bytes_of_bits(run, pairs[first:last])
        _pair_steps(fields, run, np.int32(magnitude - 1), False, steps)
        _round_sizes(wide[: b - a], steps, top, sign, codes[a:b])


@njit(nogil=True)
def _widen_sizes(codes, mask, steps, x):
    for i in range(codes.size):
        code = np.int32(codes[i])
        size = np.float32(np.int32(code & mask)) * steps[i]
        x[i] = narrow_result(-size if code > mask else size, x)


@njit(nogil=True)
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


def quantise_micro_into(
    x: Tensor, magnitude: int, scales: np.ndarray, pairs: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows to shared microexponents of so many bits of magnitude, and a sign above them."""

    def quantise(which: slice, rows: np.ndarray, found: np.ndarray) -> None:
        parts = (scales[which].reshape(-1), pairs[which].reshape(-1))
        _quantise_micro(rows, magnitude, *parts, found)

    pack_blocks(quantise, bits_of(x), MICRO_BLOCK, magnitude + 1, codes)


def dequantise_micro_into(
    scales: np.ndarray, pairs: np.ndarray, codes: np.ndarray, magnitude: int, x: Tensor
) -> None:
    """Undo `quantise_micro_into`."""

    def dequantise(which: slice, found: np.ndarray, rows: np.ndarray) -> None:
        parts = (scales[which].reshape(-1), pairs[which].reshape(-1))
        _dequantise_micro(found, magnitude, *parts, rows)

    unpack_blocks(dequantise, codes, MICRO_BLOCK, magnitude + 1, bits_of(x))


def micro_reference(x: Tensor, magnitude: int) -> Tensor:
    """Round to shared microexponents and back, in float64. Shape: `[rows, width]`, width a multiple of 16."""
    blocks = x.double().unflatten(-1, (-1, 8, 2))
    exponent = torch.frexp(blocks.abs().amax((-1, -2), keepdim=True)).exponent - 1
    own = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1
    step = torch.exp2((exponent - (own < exponent).int() - magnitude + 1).double())
    whole = (blocks.abs() / step).round().clamp(max=2**magnitude - 1)
    return (whole * step * blocks.sign()).flatten(-3)


@torch.library.custom_op("plait::quantise_micro", mutates_args=())
def quantise_micro(x: Tensor, magnitude: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise rows to shared microexponents: so many bits of magnitude, and a sign above them.

    Shape: x `[rows, width]` -> scales, pairs `[rows, ceil(width / 16)]` (exponents, bias 127; a bit for each pair that
        has one less), codes `[rows, packed_width]`, all uint8
    """
    (scales, pairs, codes), _ = coded_on_host(
        lambda x, *parts: quantise_micro_into(x, magnitude, *parts), x, _rooms(x, magnitude)
    )
    return scales, pairs, codes


def _rooms(x: Tensor, magnitude: int) -> tuple[Tensor, Tensor, Tensor]:
    scales, codes = rooms(x, MICRO_BLOCK, magnitude + 1)
    return scales, torch.empty_like(scales), codes


quantise_micro.register_fake(_rooms)


@torch.library.custom_op("plait::dequantise_micro", mutates_args=())
def dequantise_micro(
    scales: Tensor, pairs: Tensor, codes: Tensor, magnitude: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_micro`. Shape: -> `[rows, width]` of the dtype"""
    return decoded_on_host(
        lambda s, p, c, x: dequantise_micro_into(s, p, c, magnitude, x),
        (scales, pairs, codes), (codes.shape[0], width), dtype,
    )  # fmt: skip


@dequantise_micro.register_fake
def _(
    scales: Tensor, pairs: Tensor, codes: Tensor, magnitude: int, width: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@quantise_micro.register_kernel("cuda")
def quantise_micro_cuda(x: Tensor, magnitude: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise whole blocks in one launch; what the kernel does not serve goes by way of the host."""
    x = x.contiguous()
    if not fits(x, x, serves(x.dtype, x.shape[-1], magnitude + 1, MICRO_BLOCK)):
        return by_way_of_host(quantise_micro, [x], magnitude)
    parts = _rooms(x, magnitude)
    run_on(quantise_micro_launch(x, magnitude, *parts), x)
    return parts


@dequantise_micro.register_kernel("cuda")
def dequantise_micro_cuda(
    scales: Tensor, pairs: Tensor, codes: Tensor, magnitude: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, p, c = (t.contiguous() for t in (scales, pairs, codes))
    x = codes.new_empty(codes.shape[0], width, dtype=dtype)
    if not fits(x, c, serves(dtype, width, magnitude + 1, MICRO_BLOCK)):
        return by_way_of_host(dequantise_micro, [s, p, c], magnitude, width, dtype)
    run_on(dequantise_micro_launch(s, p, c, magnitude, x), c)
    return x
