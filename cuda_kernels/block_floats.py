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
from .minifloats import MINIFLOATS, round_to, table_of
from .numbers import bits_of, narrow_run, widen_run

INFINITE = np.uint32(0x7F800000)
NAN_SCALE = 255
MX_BLOCK, NVFP4_BLOCK = 32, 16
LIFTS = {"floor": 0, "ceil": 0x7FFFFF}


def lift_of(rule: str, mantissa_bits: int) -> int:
    """What to add to the bits of a block's largest element before its exponent is read.

    "floor" may saturate the largest element; "even" rounds it to the element's mantissa first; "ceil" never saturates.
    """
    return 1 << (22 - mantissa_bits) if rule == "even" else LIFTS[rule]


@njit(nogil=True, cache=True)
def _round_run(wide, factor, mantissa_bits, lowest, largest, sign_at, codes):
    for i in range(wide.size):
        codes[i] = round_to(wide[i] * factor, mantissa_bits, lowest, largest, sign_at)


@njit(nogil=True, cache=True)
def _quantise_mx(x, size, lift, top, form, largest, scales, codes):
    """Shape: x, codes `[rows, width]`, scales `[rows, blocks]` uint8: the exponent with bias 127."""
    mantissa_bits, lowest, sign_at = form
    rows, width = x.shape
    wide = np.empty(size, np.float32)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * size, min((b + 1) * size, width)
            run = wide[: stop - start]
            worst = widen_run(x[r, start:stop], run)
            if worst > INFINITE:
                scales[r, b] = NAN_SCALE
                codes[r, start:stop] = 0
                continue
            field = np.int32((worst + np.uint32(lift)) >> np.uint32(23))
            scale = min(max(field - top, 0), 254)
            scales[r, b] = scale
            shift = np.uint32(254 - scale)  # 2 ** (127 - scale), exactly
            bits = shift << np.uint32(23) if shift > 0 else 0x00400000
            factor = np.uint32(bits).view(np.float32)
            _round_run(run, factor, mantissa_bits, lowest, largest, sign_at, codes[r, start:stop])


@njit(nogil=True, cache=True)
def _dequantise_mx(codes, size, table, scales, x):
    rows, width = codes.shape
    wide = np.empty(width, np.float32)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * size, min((b + 1) * size, width)
            field = np.uint32(scales[r, b])
            scale = np.uint32(field << np.uint32(23)).view(np.float32)
            if field == np.uint32(NAN_SCALE):
                scale = np.float32(np.nan)
            elif field == np.uint32(0):
                scale = np.uint32(0x00400000).view(np.float32)
            run, out = codes[r, start:stop], wide[start:stop]
            for i in range(run.size):
                out[i] = table[run[i]] * scale
        narrow_run(wide, x[r])


@njit(nogil=True, cache=True)
def _misses(wide, factor, table, codes):
    """Squared error in units of the scale, doubled by its square by whoever compares scales."""
    total = np.float32(0)
    for i in range(wide.size):
        miss = wide[i] * factor - table[codes[i]]
        total += miss * miss
    return total


@njit(nogil=True, cache=True)
def _nvfp4_scale(largest, top, whole, byte_table):
    """A block's scale: as a code of e4m3, and what to multiply its elements by."""
    wish = np.float32(np.float32(largest / top) / whole)
    wish = min(max(wish, np.float32(2.0**-6)), np.float32(448))
    code = round_to(wish, 3, np.int32(121), np.float32(448), 7)
    return code, np.float32(np.float32(np.float32(1) / whole) / byte_table[code])


@njit(nogil=True, cache=True)
def _quantise_nvfp4(x, size, whole, both, byte_table, table, scales, codes):
    """Shape: x, codes `[rows, width]`, scales `[rows, blocks]` uint8. `both`: try 4 as the largest element too."""
    rows, width = x.shape
    wide, other = np.empty(size, np.float32), np.empty(size, np.uint8)
    six, low, top = np.float32(6), np.int32(127), np.float32(6)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * size, min((b + 1) * size, width)
            run, out, alt = wide[: stop - start], codes[r, start:stop], other[: stop - start]
            largest = np.uint32(widen_run(x[r, start:stop], run)).view(np.float32)
            scale, factor = _nvfp4_scale(largest, six, whole, byte_table)
            _round_run(run, factor, 1, low, top, 3, out)
            if both:
                scale4, factor4 = _nvfp4_scale(largest, np.float32(4), whole, byte_table)
                _round_run(run, factor4, 1, low, top, 3, alt)
                here, there = byte_table[scale], byte_table[scale4]
                worse = _misses(run, factor, table, out) * here * here
                if _misses(run, factor4, table, alt) * there * there < worse:
                    out[:], scale = alt, scale4
            scales[r, b] = scale


@njit(nogil=True, cache=True)
def _dequantise_nvfp4(codes, size, whole, byte_table, table, scales, x):
    rows, width = codes.shape
    wide = np.empty(width, np.float32)
    for r in range(rows):
        for b in range(scales.shape[1]):
            start, stop = b * size, min((b + 1) * size, width)
            scale = byte_table[scales[r, b]] * whole
            run, out = codes[r, start:stop], wide[start:stop]
            for i in range(run.size):
                out[i] = table[run[i]] * scale
        narrow_run(wide, x[r])


def quantise_mx_into(
    x: Tensor, form: str, rule: str, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes; see `quantise_mx`."""
    kind, source = MINIFLOATS[form], bits_of(x)
    lift, top = lift_of(rule, kind.mantissa_bits), kind.top_exponent
    what = (kind.mantissa_bits, np.int32(128 - kind.bias), kind.bits - 1)
    largest = np.float32(kind.largest)

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        _quantise_mx(source[a:b], MX_BLOCK, lift, top, what, largest, scales[a:b], tile)

    pack_tiles(quantise, source.shape, kind.bits, codes)


def dequantise_mx_into(scales: np.ndarray, codes: np.ndarray, form: str, x: Tensor) -> None:
    """Undo `quantise_mx_into`; a block of scale NaN is NaN."""
    target, table = bits_of(x), table_of(form)

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        _dequantise_mx(tile, MX_BLOCK, table, scales[a:b], target[a:b])

    unpack_tiles(dequantise, target.shape, MINIFLOATS[form].bits, codes)


def nvfp4_whole(x: Tensor) -> float:
    """The float32 scale of a page: its largest magnitude becomes 448 * 6. Not finite if an element is not."""
    whole = float(x.detach().float().abs().amax() / (448.0 * 6.0)) if x.numel() else 0.0
    return 1.0 if whole < 2.0**-126 else whole


def quantise_nvfp4_into(
    x: Tensor, whole: float, both: bool, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes; see `quantise_nvfp4`."""
    source, g = bits_of(x), np.float32(whole)
    byte_table, table = table_of("e4m3"), table_of("e2m1")

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        _quantise_nvfp4(source[a:b], NVFP4_BLOCK, g, both, byte_table, table, scales[a:b], tile)

    pack_tiles(quantise, source.shape, 4, codes)


def dequantise_nvfp4_into(scales: np.ndarray, codes: np.ndarray, whole: float, x: Tensor) -> None:
    """Undo `quantise_nvfp4_into`."""
    target, g = bits_of(x), np.float32(whole)
    byte_table, table = table_of("e4m3"), table_of("e2m1")

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        _dequantise_nvfp4(tile, NVFP4_BLOCK, g, byte_table, table, scales[a:b], target[a:b])

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


# inlines halves.py and minifloats.py and numbers.py da80d095
