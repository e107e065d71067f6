"""Blocks of small floats with a shared scale: OCP MX (powers of two) and NVFP4 (e4m3 times a float32).

Source: OCP Microscaling Formats v1.0 section 6.3 and NVFP4 as torchao computes them, bit for bit; blocks lie along the
last dim and the last one of a row may be shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bits import pack_tiles, packed_width, unpack_tiles
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
from .minifloats import MINIFLOATS, float16_of, round_to, rounding_of, widen_code
from .numbers import bits_of

INFINITE = np.int32(0x7F800000)
NAN_SCALE = 255
MX_BLOCK, NVFP4_BLOCK = 32, 16
LIFTS = {"floor": 0, "ceil": 0x7FFFFF}


def lift_of(rule: str, mantissa_bits: int) -> int:
    """What to add to the bits of a block's largest element before its exponent is read.

    "floor" may saturate the largest element; "even" rounds it to the element's mantissa first; "ceil" never saturates.
    """
    return 1 << (22 - mantissa_bits) if rule == "even" else LIFTS[rule]


@njit(nogil=True, cache=True)
def _round_run(wide, steps, form, codes):
    lowest, largest, lift, unit, sign = form
    for i in range(wide.size):
        codes[i] = round_to(wide[i] * steps[i], lowest, largest, lift, unit, sign)


@njit(nogil=True, cache=True)
def _widen_run(codes, steps, form, x):
    lift, size_bits, sign_lift, top, bias = form
    for i in range(codes.size):
        x[i] = narrow_result(
            widen_code(codes[i], lift, size_bits, sign_lift, top) * bias * steps[i], x
        )


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
        _round_run(wide[:n], steps, form, codes[a:b])


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
        _widen_run(codes[a:b], steps, form, x[a:b])


@njit(nogil=True, cache=True, error_model="numpy")
def _nvfp4_scales(worst, top, whole, forms, scales, sizes, factors):
    """Choose scales for a largest element of `top`: codes of e4m3, their values, what to multiply elements by."""
    lowest, largest, lift, unit, sign = forms[0]
    back, size_bits, sign_lift, end, bias = forms[1]
    inverse = np.float32(np.float32(1) / whole)
    for b in range(worst.size):
        wish = np.float32(np.float32(np.int32(worst[b]).view(np.float32) / top) / whole)
        wish = wish if wish > np.float32(2.0**-6) else np.float32(2.0**-6)
        code = round_to(wish, lowest, largest, lift, unit, sign)
        size = np.float32(widen_code(code, back, size_bits, sign_lift, end) * bias)
        scales[b], sizes[b], factors[b] = code, size, np.float32(inverse / size)


@njit(nogil=True, cache=True)
def _misses(wide, steps, codes, form, parts, more, sums):
    """Squared errors of blocks, in units of their scales; neighbours are added, then neighbours of those."""
    lift, size_bits, sign_lift, top, bias = form
    for i in range(codes.size):
        value = widen_code(codes[i], lift, size_bits, sign_lift, top) * bias
        miss = np.float32(wide[i] * steps[i] - value)
        parts[i] = miss * miss
    _add_pairs(parts, more[: codes.size // 2])
    _add_pairs(more, parts[: codes.size // 4])
    _add_pairs(parts, more[: codes.size // 8])
    _add_pairs(more, sums)


@njit(nogil=True, cache=True)
def _add_pairs(parts, sums):
    for i in range(sums.size):
        sums[i] = parts[2 * i] + parts[2 * i + 1]


@njit(nogil=True, cache=True)
def _choose(sizes, misses, better, mask):
    for b in range(mask.size):
        six = misses[0, b] * sizes[0, b] * sizes[0, b]
        four = misses[1, b] * sizes[1, b] * sizes[1, b]
        mask[b] = np.uint8(255) if four < six else np.uint8(0)
        better[0, b] = better[1, b] if four < six else better[0, b]


@njit(nogil=True, cache=True)
def _replace(mask, other, codes):
    for i in range(codes.size):
        codes[i] = np.uint8(codes[i] ^ np.uint8(np.uint8(codes[i] ^ other[i]) & mask[i]))


@njit(nogil=True, cache=True)
def _quantise_nvfp4(x, whole, both, forms, scales, codes):
    """Shape: x, codes `[blocks * 16]`, scales `[blocks]` uint8. `both`: try 4 as the largest element too."""
    wide, many = np.empty(RUN, np.float32), RUN // NVFP4_BLOCK
    steps, misses = np.empty((2, RUN), np.float32), np.empty((2, many), np.float32)
    parts, more = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    other, mask, taken = np.empty(RUN, np.uint8), np.empty(RUN, np.uint8), np.empty(many, np.uint8)
    worst, chosen = np.empty(many, np.int32), np.empty((2, many), np.uint8)
    sizes, factors = np.empty((2, many), np.float32), np.empty(many, np.float32)
    for a in range(0, x.size, RUN):
        b = min(a + RUN, x.size)
        first, last = a // NVFP4_BLOCK, b // NVFP4_BLOCK
        n, blocks = b - a, last - first
        widen_all(x[a:b], wide[:n])
        worst_of_blocks(wide, NVFP4_BLOCK, worst[:blocks])
        for way in range(2 if both else 1):
            top, out = (np.float32(4), other[:n]) if way else (np.float32(6), codes[a:b])
            _nvfp4_scales(worst[:blocks], top, whole, forms, chosen[way], sizes[way], factors)
            spread(factors[:blocks], NVFP4_BLOCK, steps[way])
            _round_run(wide[:n], steps[way], forms[2], out)
            if both:
                _misses(wide, steps[way], out, forms[3], parts, more, misses[way, :blocks])
        if both:
            _choose(sizes, misses, chosen, taken[:blocks])
            spread(taken[:blocks], NVFP4_BLOCK, mask)
            _replace(mask, other, codes[a:b])
        scales[first:last] = chosen[0, :blocks]


@njit(nogil=True, cache=True)
def _nvfp4_factors(scales, form, whole, factors):
    lift, size_bits, sign_lift, top, bias = form
    for b in range(scales.size):
        factors[b] = widen_code(scales[b], lift, size_bits, sign_lift, top) * bias * whole


@njit(nogil=True, cache=True)
def _dequantise_nvfp4(codes, whole, forms, scales, x):
    steps, factors = np.empty(RUN, np.float32), np.empty(RUN // NVFP4_BLOCK, np.float32)
    for a in range(0, x.size, RUN):
        b = min(a + RUN, x.size)
        first, last = a // NVFP4_BLOCK, b // NVFP4_BLOCK
        _nvfp4_factors(scales[first:last], forms[0], whole, factors)
        spread(factors[: last - first], NVFP4_BLOCK, steps)
        _widen_run(codes[a:b], steps, forms[1], x[a:b])


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


def nvfp4_whole(x: Tensor) -> float:
    """The float32 scale of a page: its largest magnitude becomes 448 * 6. Not finite if an element is not."""
    least, most = x.detach().aminmax() if x.numel() else (torch.zeros(()), torch.zeros(()))
    whole = float(torch.maximum(-least, most).float() / (448.0 * 6.0))
    return 1.0 if whole < 2.0**-126 else whole


def quantise_nvfp4_into(
    x: Tensor, whole: float, both: bool, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes; see `quantise_nvfp4`."""
    source, g = bits_of(x), np.float32(whole)
    forms = (rounding_of("e4m3"), float16_of("e4m3"), rounding_of("e2m1"), float16_of("e2m1"))

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(source[a:b], NVFP4_BLOCK), whole_blocks(tile, NVFP4_BLOCK)
        flat = scales[a:b].reshape(-1)
        _quantise_nvfp4(rows.reshape(-1), g, both, forms, flat, room.reshape(-1))
        keep(room, tile)

    pack_tiles(quantise, source.shape, 4, codes)


def dequantise_nvfp4_into(scales: np.ndarray, codes: np.ndarray, whole: float, x: Tensor) -> None:
    """Undo `quantise_nvfp4_into`."""
    target, g = bits_of(x), np.float32(whole if whole == whole else np.nan)
    forms = (float16_of("e4m3"), float16_of("e2m1"))

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(tile, NVFP4_BLOCK), whole_blocks(target[a:b], NVFP4_BLOCK)
        _dequantise_nvfp4(rows.reshape(-1), g, forms, scales[a:b].reshape(-1), room.reshape(-1))
        keep(room, target[a:b])

    unpack_tiles(dequantise, target.shape, 4, codes)


@torch.library.custom_op("plait::quantise_mx", mutates_args=())
def quantise_mx(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    """Quantise rows to OCP MX floats: scales (exponents, bias 127; 255 is NaN) and packed codes.

    Args:
        form: one of `MINIFLOATS`.
        rule: how the scale is chosen: "floor", "even" or "ceil"; see `lift_of`.

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / 32)]`, codes `[rows, packed_width]` uint8
    """
    scales, codes = (t.cpu() for t in _rooms(x, MX_BLOCK, MINIFLOATS[form].bits))
    quantise_mx_into(x.cpu().contiguous(), form, rule, scales.numpy(), codes.numpy())
    return scales.to(x.device), codes.to(x.device)


@quantise_mx.register_fake
def _(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    return _rooms(x, MX_BLOCK, MINIFLOATS[form].bits)


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


@torch.library.custom_op("plait::quantise_nvfp4", mutates_args=())
def quantise_nvfp4(x: Tensor, whole: float, both: bool) -> tuple[Tensor, Tensor]:
    """Quantise rows to NVFP4 under a given scale of all: scales (e4m3) and packed codes.

    Args:
        whole: float32 scale of everything; `nvfp4_whole(x)` or a calibrated one.
        both: try 4 as a block's largest element as well as 6.

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / 16)]`, codes `[rows, packed_width]` uint8
    """
    scales, codes = (t.cpu() for t in _rooms(x, NVFP4_BLOCK, 4))
    quantise_nvfp4_into(x.cpu().contiguous(), whole, both, scales.numpy(), codes.numpy())
    return scales.to(x.device), codes.to(x.device)


@quantise_nvfp4.register_fake
def _(x: Tensor, whole: float, both: bool) -> tuple[Tensor, Tensor]:
    return _rooms(x, NVFP4_BLOCK, 4)


@torch.library.custom_op("plait::dequantise_nvfp4", mutates_args=())
def dequantise_nvfp4(
    scales: Tensor, codes: Tensor, whole: float, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_nvfp4`. Shape: -> `[rows, width]` of the dtype."""
    x = torch.empty(codes.shape[0], width, dtype=dtype)
    s, c = (t.cpu().contiguous().numpy() for t in (scales, codes))
    dequantise_nvfp4_into(s, c, whole, x)
    return x.to(codes.device)


@dequantise_nvfp4.register_fake
def _(scales: Tensor, codes: Tensor, whole: float, width: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


def _rooms(x: Tensor, block: int, bits: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    scales = x.new_empty(rows, -(-width // block), dtype=torch.uint8)
    return scales, x.new_empty(rows, packed_width(width, bits), dtype=torch.uint8)


# inlines block_runs.py and halves.py and minifloats.py 7676f480
