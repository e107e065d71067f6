"""Blocks of small floats with a shared power of two: OCP MX.

Source: OCP Microscaling Formats v1.0 section 6.3, as torchao computes it, bit for bit; blocks lie along the last dim
and the last one of a row may be shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bits import pack_tiles, packed_width, unpack_tiles
from .block_floats_gpu import dequantise_mx_launch, quantise_mx_launch, serves
from .block_runs import (
    RUN,
    clear_blocks,
    keep,
    power,
    round_run,
    spread,
    whole_blocks,
    widen_all,
    widen_codes,
    worst_of_blocks,
)
from .gpu.toolchain import usable
from .minifloats import MINIFLOATS, float16_of, rounding_of
from .numbers import bits_of

INFINITE = np.int32(0x7F800000)
NAN_SCALE = 255
MX_BLOCK = 32
LIFTS = {"floor": 0, "ceil": 0x7FFFFF}


def lift_of(rule: str, mantissa_bits: int) -> int:
    """What to add to the bits of a block's largest element before its exponent is read.

    "floor" may saturate the largest element; "even" rounds it to the element's mantissa first; "ceil" never saturates.
    """
    return 1 << (22 - mantissa_bits) if rule == "even" else LIFTS[rule]


@njit(nogil=True, cache=True)
def _mx_scales(worst, lift, top, scales, factors):
    """Choose exponents, and what to multiply by; give how many blocks hold a NaN."""
    odd = 0
    for b in range(worst.size):
        nan = worst[b] > INFINITE
        field = np.int32(np.int32(np.int32(worst[b] + lift) >> np.int32(23)) - top)
        field = np.int32(min(max(field, np.int32(0)), np.int32(254)))
        scales[b] = np.uint8(NAN_SCALE) if nan else np.uint8(field)
        factors[b] = power(np.int32(np.int32(254) - field))
        odd += nan
    return odd


@njit(nogil=True, cache=True)
def _quantise_mx(x, lift, top, form, scales, codes):
    """Shape: x, codes `[blocks * 32]`, scales `[blocks]` uint8: the exponent with bias 127."""
    wide, steps = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    worst, factors = np.empty(RUN // MX_BLOCK, np.int32), np.empty(RUN // MX_BLOCK, np.float32)
    for a in range(0, x.size, RUN):
        b = min(a + RUN, x.size)
        first, last = a // MX_BLOCK, b // MX_BLOCK
        n, blocks = b - a, last - first
        widen_all(x[a:b], wide[:n])
        worst_of_blocks(wide, MX_BLOCK, worst[:blocks])
        if _mx_scales(worst[:blocks], lift, top, scales[first:last], factors):
            clear_blocks(worst[:blocks], MX_BLOCK, wide)
        spread(factors[:blocks], MX_BLOCK, steps)
        round_run(wide[:n], steps, form, codes[a:b])


@njit(nogil=True, cache=True)
def _mx_factors(scales, factors):
    for b in range(scales.size):
        value = power(np.int32(scales[b]))
        factors[b] = np.float32(np.nan) if scales[b] == NAN_SCALE else value


@njit(nogil=True, cache=True)
def _dequantise_mx(codes, form, scales, x):
    steps, factors = np.empty(RUN, np.float32), np.empty(RUN // MX_BLOCK, np.float32)
    for a in range(0, x.size, RUN):
        b = min(a + RUN, x.size)
        first, last = a // MX_BLOCK, b // MX_BLOCK
        _mx_factors(scales[first:last], factors)
        spread(factors[: last - first], MX_BLOCK, steps)
        widen_codes(codes[a:b], steps, form, x[a:b])


def quantise_mx_into(
    x: Tensor, form: str, rule: str, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes; see `quantise_mx`."""
    kind, source, rounding = MINIFLOATS[form], bits_of(x), rounding_of(form)
    lift, top = np.int32(lift_of(rule, kind.mantissa_bits)), np.int32(kind.top_exponent)

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(source[a:b], MX_BLOCK), whole_blocks(tile, MX_BLOCK)
        flat = scales[a:b].reshape(-1)
        _quantise_mx(rows.reshape(-1), lift, top, rounding, flat, room.reshape(-1))
        keep(room, tile)

    pack_tiles(quantise, source.shape, kind.bits, codes)


def dequantise_mx_into(scales: np.ndarray, codes: np.ndarray, form: str, x: Tensor) -> None:
    """Undo `quantise_mx_into`; a block of scale NaN is NaN."""
    target, how = bits_of(x), float16_of(form)

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(tile, MX_BLOCK), whole_blocks(target[a:b], MX_BLOCK)
        _dequantise_mx(rows.reshape(-1), how, scales[a:b].reshape(-1), room.reshape(-1))
        keep(room, target[a:b])

    unpack_tiles(dequantise, target.shape, MINIFLOATS[form].bits, codes)


@torch.library.custom_op("plait::quantise_mx", mutates_args=())
def quantise_mx(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    """Quantise rows to OCP MX floats: scales (exponents, bias 127; 255 is NaN) and packed codes.

    Args:
        form: one of `MINIFLOATS`.
        rule: how the scale is chosen: "floor", "even" or "ceil"; see `lift_of`.

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / 32)]`, codes `[rows, packed_width]` uint8
    """
    scales, codes = (t.cpu() for t in rooms(x, MX_BLOCK, MINIFLOATS[form].bits))
    quantise_mx_into(x.cpu().contiguous(), form, rule, scales.numpy(), codes.numpy())
    return scales.to(x.device), codes.to(x.device)


@quantise_mx.register_fake
def _(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    return rooms(x, MX_BLOCK, MINIFLOATS[form].bits)


@torch.library.custom_op("plait::dequantise_mx", mutates_args=())
def dequantise_mx(
    scales: Tensor, codes: Tensor, form: str, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_mx`. Shape: -> `[rows, width]` of the dtype."""
    x = torch.empty(codes.shape[0], width, dtype=dtype)
    s, c = (t.cpu().contiguous().numpy() for t in (scales, codes))
    dequantise_mx_into(s, c, form, x)
    return x.to(codes.device)


@dequantise_mx.register_fake
def _(scales: Tensor, codes: Tensor, form: str, width: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@quantise_mx.register_kernel("cuda")
def quantise_mx_cuda(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    """Quantise whole blocks in one launch; what the kernel does not serve goes by way of the host."""
    x = x.contiguous()
    if not fits(x, x, MX_BLOCK):
        scales, codes = quantise_mx(x.cpu(), form, rule)
        return scales.to(x.device), codes.to(x.device)
    scales, codes = rooms(x, MX_BLOCK, MINIFLOATS[form].bits)
    lift = lift_of(rule, MINIFLOATS[form].mantissa_bits)
    variant, grid, args = quantise_mx_launch(x, form, lift, scales, codes)
    variant.launch(grid, *args)
    return scales, codes


@dequantise_mx.register_kernel("cuda")
def dequantise_mx_cuda(
    scales: Tensor, codes: Tensor, form: str, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, c = scales.contiguous(), codes.contiguous()
    x = c.new_empty(c.shape[0], width, dtype=dtype)
    if not fits(x, c, MX_BLOCK):
        return dequantise_mx(s.cpu(), c.cpu(), form, width, dtype).to(codes.device)
    variant, grid, args = dequantise_mx_launch(s, c, form, x)
    variant.launch(grid, *args)
    return x


def fits(x: Tensor, bytes_of: Tensor, block: int) -> bool:
    """Say whether the kernels take these rows, and can run."""
    aligned = x.data_ptr() % 16 == 0 and bytes_of.data_ptr() % 8 == 0
    return bool(x.numel()) and aligned and serves(x.dtype, x.shape[-1], block) and usable()


def rooms(x: Tensor, block: int, bits: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    scales = x.new_empty(rows, -(-width // block), dtype=torch.uint8)
    return scales, x.new_empty(rows, packed_width(width, bits), dtype=torch.uint8)


# inlines block_runs.py and halves.py and minifloats.py 513bafc8
