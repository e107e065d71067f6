"""Whole numbers of a few bits between the least and the largest element of a group, with a scale and a low end each.

    low = min(x);  scale = (max(x) - low) / (2 ** bits - 1);  code = round((x - low) / scale);  x ~ low + code * scale

Groups lie along a token's vector ("tokens": int4, int2, KIVI's values) or along the tokens of a channel ("channels":
KIVI's keys). Scale and low end are 16-bit floats, bfloat16 for bfloat16 pages, else float16; codes are of the rounded.

Source: KIVI (arXiv 2402.02750) section 3, without its division by zero: a group of one value has scale 0 and is exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import four_bits, int_channels_gpu, int_groups_gpu, two_bits
from .bits import TILE, pack_tiles, packed_width, unpack_tiles
from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .halves import narrow, narrow_result, widen
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .numbers import bits_of, half_of
from .workers import run_rows

CANNOT = "quantise_groups: infinities, NaN, or values too large for 16-bit scales"
STRAIGHT = {2: two_bits, 4: four_bits}  # widths whose codes become numbers in registers
COLUMNS = 1024  # done together: a group of them stays in the second cache


def quantise_reference(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups along dim 1 in plain torch.

    Shape: x `[outer, along, inner]` -> codes likewise (uint8), scales, lows `[outer, groups, inner]`
    """
    top, half = 2**bits - 1, half_of(x.dtype)
    groups = -(-x.shape[1] // group)
    which = torch.arange(x.shape[1]) // group
    wide = x.float()
    parts = [wide[:, which == g] for g in range(groups)]
    lows = torch.stack([part.amin(1) for part in parts], 1)
    tops = torch.stack([part.amax(1) for part in parts], 1)
    scales, lows = ((tops - lows) / top).to(half), lows.to(half)
    step = scales.float()[:, which]
    codes = ((wide - lows.float()[:, which]) / step).round().clamp(0, top)
    return torch.where(step > 0, codes, 0.0).to(torch.uint8), scales, lows


def dequantise_reference(codes: Tensor, scales: Tensor, lows: Tensor, group: int) -> Tensor:
    """Undo `quantise_reference`, in float32."""
    which = torch.arange(codes.shape[1]) // group
    return codes.float() * scales.float()[:, which] + lows.float()[:, which]


@njit(nogil=True)
def _key(value):
    """A float32 as an integer of the same order, NaN outside the infinities; a minimum of those is vector code."""
    bits = np.int32(np.float32(value).view(np.int32))
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(nogil=True)
def _number(key):
    """Undo `_key`."""
    bits = np.int32(np.int32(key) ^ np.int32(np.int32(key >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(bits).view(np.float32)


@njit(nogil=True)
def _ends(row, wide):
    """Widen a run; give the keys of its least and largest element."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for i in range(row.size):
        value = np.float32(widen(row[i]))
        wide[i] = value
        key = _key(value)
        low = key if key < low else low
        high = key if key > high else high
    return low, high


@njit(nogil=True, error_model="numpy")
def _round(wide, low, scale, top, codes):
    for i in range(wide.size):
        code = np.rint((wide[i] - low) / scale)
        codes[i] = np.uint8(np.int32(min(max(code, np.float32(0)), top)))


@njit(nogil=True)
def _quantise_rows(x, group, top, codes, scales, lows):
    """Groups along a row. Shape: x, codes `[rows, width]`, scales, lows `[rows, groups]`; give how many failed."""
    rows, width = x.shape
    wide = np.empty(group, np.float32)
    bad = 0
    for r in range(rows):
        for g in range(scales.shape[1]):
            a, b = g * group, min((g + 1) * group, width)
            first, last = _ends(x[r, a:b], wide[: b - a])
            scales[r, g] = narrow((_number(last) - _number(first)) / top, scales)
            lows[r, g] = narrow(_number(first), lows)
            scale, low = widen(scales[r, g]), widen(lows[r, g])
            if not (np.isfinite(scale) and np.isfinite(low)):
                bad += 1
            if scale > 0:
                _round(wide[: b - a], low, scale, top, codes[r, a:b])
            else:
                codes[r, a:b] = 0
    return bad


@njit(nogil=True)
def _dequantise_rows(codes, group, scales, lows, x):
    rows, width = codes.shape
    for r in range(rows):
        for g in range(scales.shape[1]):
            a, b = g * group, min((g + 1) * group, width)
            scale, low = widen(scales[r, g]), widen(lows[r, g])
            run, out = codes[r, a:b], x[r, a:b]
            for i in range(run.size):
                out[i] = narrow_result(np.float32(run[i]) * scale + low, x)


@njit(nogil=True)
def _widen_ends(row, wide, low, high):
    """One more row of a group of columns: keys of the least and largest so far."""
    for c in range(row.size):
        value = np.float32(widen(row[c]))
        wide[c] = value
        key = _key(value)
        low[c] = key if key < low[c] else low[c]
        high[c] = key if key > high[c] else high[c]


@njit(nogil=True, error_model="numpy")  # a look for zeros would keep it from being vector code
def _round_row(wide, low, scale, top, codes):
    for c in range(wide.size):
        code = np.rint((wide[c] - low[c]) / scale[c])
        codes[c] = np.uint8(np.int32(min(max(code, np.float32(0)), top)))


@njit(nogil=True)
def _quantise_columns(x, top, codes, scales, lows):
    """Groups along a column. Shape: x, codes `[groups, group, inner]`, scales, lows `[groups, inner]`."""
    groups, group, inner = x.shape
    wide = np.empty((group, COLUMNS), np.float32)
    least, largest = np.empty(COLUMNS, np.int32), np.empty(COLUMNS, np.int32)
    low, step = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    bad = 0
    for g in range(groups):
        for a in range(0, inner, COLUMNS):
            b = min(a + COLUMNS, inner)
            n = b - a
            least[:], largest[:] = 0x7FFFFFFF, -0x7FFFFFFF
            for t in range(group):
                _widen_ends(x[g, t, a:b], wide[t, :n], least[:n], largest[:n])
            for c in range(n):
                first = _number(least[c])
                scales[g, a + c] = narrow((_number(largest[c]) - first) / top, scales)
                lows[g, a + c] = narrow(first, lows)
                scale = widen(scales[g, a + c])
                low[c] = widen(lows[g, a + c])
                if not (np.isfinite(scale) and np.isfinite(low[c])):
                    bad += 1
                step[c] = scale if scale > 0 else np.inf  # anything over infinity is code 0
            for t in range(group):
                _round_row(wide[t, :n], low[:n], step[:n], top, codes[g, t, a:b])
    return bad


@njit(nogil=True)
def _dequantise_row(codes, scale, low, out):
    for c in range(codes.size):
        out[c] = narrow_result(np.float32(codes[c]) * scale[c] + low[c], out)


@njit(nogil=True)
def _widen_run(row, wide):
    for c in range(row.size):
        wide[c] = widen(row[c])


@njit(nogil=True)
def _dequantise_columns(codes, scales, lows, x):
    groups, group, inner = codes.shape
    scale, low = np.empty(inner, np.float32), np.empty(inner, np.float32)
    for g in range(groups):
        _widen_run(scales[g], scale)
        _widen_run(lows[g], low)
        for t in range(group):
            _dequantise_row(codes[g, t], scale, low, x[g, t])


def quantise_into(
    x: Tensor, bits: int, group: int, channels: bool,
    codes: np.ndarray, scales: np.ndarray, lows: np.ndarray,
) -> bool:  # fmt: skip
    """Quantise a contiguous tensor in host memory into packed codes; say whether every group could be.

    Shape: see `quantise_groups`; 16-bit floats as `bits_of` sees them
    """
    source, top = bits_of(x), np.float32(2**bits - 1)
    bad: list[int] = []
    if channels:
        many = source.reshape(-1, group, x.shape[-1])
        s, low = (part.reshape(-1, x.shape[-1]) for part in (scales, lows))

        def quantise(a: int, b: int, tile: np.ndarray) -> None:
            bad.append(_quantise_columns(many[a:b], top, tile, s[a:b], low[a:b]))
    else:
        many = source

        def quantise(a: int, b: int, tile: np.ndarray) -> None:
            bad.append(_quantise_rows(many[a:b], group, top, tile, scales[a:b], lows[a:b]))

    pack_tiles(quantise, many.shape, bits, codes)
    return not any(bad)


def _whole_runs(x: Tensor, group: int, channels: bool) -> bool:
    """Say whether 32 elements after each other have one scale, or a whole run of scales."""
    fits = not x.shape[-1] % 32 and (channels or not group % 32)
    return fits and x.dtype != torch.float64 and x.is_contiguous()


def _dequantise_straight(
    codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, bits: int, group: int, x: np.ndarray
) -> None:
    """Undo it without a tile of codes; in threads where there is much."""
    kernels, many = STRAIGHT[bits], codes.reshape(*x.shape[:-1], -1)

    def part(a: int, b: int) -> None:
        if x.ndim == 3:
            kernels.of_columns(many[a:b], scales[a:b], lows[a:b], x[a:b])
        else:
            kernels.of_rows(many[a:b], group, scales[a:b], lows[a:b], x[a:b])

    run_rows(part, len(x), -(-TILE * len(x) // max(1, x.size)))


def dequantise_into(
    codes: np.ndarray, scales: np.ndarray, lows: np.ndarray,
    bits: int, group: int, channels: bool, x: Tensor,
) -> None:  # fmt: skip
    """Undo `quantise_into`."""
    target = bits_of(x)
    if channels:
        many = target.reshape(-1, group, x.shape[-1])
        s, low = (part.reshape(-1, x.shape[-1]) for part in (scales, lows))
    else:
        many, s, low = target, scales, lows
    if bits in STRAIGHT and _whole_runs(x, group, channels):
        _dequantise_straight(codes, s, low, bits, group, many)
        return
    if channels:

        def dequantise(a: int, b: int, tile: np.ndarray) -> None:
            _dequantise_columns(tile, s[a:b], low[a:b], many[a:b])
    else:

        def dequantise(a: int, b: int, tile: np.ndarray) -> None:
            _dequantise_rows(tile, group, s[a:b], low[a:b], many[a:b])

    unpack_tiles(dequantise, many.shape, bits, codes)


@torch.library.custom_op("plait::quantise_groups", mutates_args=())
def quantise_groups(
    x: Tensor, bits: int, group: int, channels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to packed codes with a scale and a low end for each group.

    Args:
        group: elements of a group, along the last dim or, with `channels`, along the one before it.

    Shape: x `[rows, width]` -> codes `[rows, packed_width]` uint8, scales, lows `[rows, ceil(width / group)]`;
        with `channels` x `[outer, tokens, inner]` -> codes `[outer, tokens, packed_width]`, scales, lows
        `[outer, tokens / group, inner]`

    Raises:
        ValueError: an element is infinite or NaN, or a group too wide for its 16-bit scale; groups that do not fit.
    """
    if channels and x.shape[1] % group:
        raise ValueError(f"quantise_groups: {x.shape[1]} tokens are no whole groups of {group}")

    def fill(x: Tensor, codes: np.ndarray, scales: np.ndarray, lows: np.ndarray) -> bool:
        flat = codes.reshape(-1, codes.shape[-1])
        return quantise_into(x, bits, group, channels, flat, scales, lows)

    parts, fine = coded_on_host(fill, x, _room(x, bits, group, channels))
    if not fine:
        raise ValueError(CANNOT)
    return parts[0], parts[1], parts[2]


def _room(x: Tensor, bits: int, group: int, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(*x.shape[:-1], packed_width(x.shape[-1], bits), dtype=torch.uint8)
    along = -2 if channels else -1
    shape = [*x.shape]
    shape[along] = -(-shape[along] // group)
    scales = x.new_empty(shape, dtype=half_of(x.dtype))
    return codes, scales, torch.empty_like(scales)


quantise_groups.register_fake(_room)


@torch.library.custom_op("plait::dequantise_groups", mutates_args=())
def dequantise_groups(
    codes: Tensor, scales: Tensor, lows: Tensor,
    bits: int, group: int, channels: bool, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Undo `quantise_groups`. Shape: -> `[..., width]` of the dtype."""

    def fill(c: np.ndarray, s: np.ndarray, low: np.ndarray, x: Tensor) -> None:
        dequantise_into(c.reshape(-1, c.shape[-1]), s, low, bits, group, channels, x)

    shape = (*codes.shape[:-1], width)
    return decoded_on_host(fill, (codes, scales, lows), shape, dtype)


@dequantise_groups.register_fake
def _(
    codes: Tensor, scales: Tensor, lows: Tensor,
    bits: int, group: int, channels: bool, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(*codes.shape[:-1], width, dtype=dtype)


def _fits(x: Tensor, bits: int, group: int, channels: bool) -> bool:
    """Say whether the CUDA kernels take such a page."""
    width = x.shape[-1]
    if channels:
        groups = x.numel() // (group * max(1, width))
        return int_channels_gpu.serves(x.dtype, width, bits, groups)
    return int_groups_gpu.serves(x.dtype, width, bits, group)


@quantise_groups.register_kernel("cuda")
def quantise_groups_cuda(
    x: Tensor, bits: int, group: int, channels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise in one launch; what the kernels do not serve goes by way of the host."""
    x = x.contiguous()
    fits = _fits(x, bits, group, channels) and x.data_ptr() % 16 == 0
    if not fits or not x.numel() or not usable():
        return by_way_of_host(quantise_groups, [x], bits, group, channels)
    codes, scales, lows = _room(x, bits, group, channels)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    choose = int_channels_gpu.quantise_launch if channels else int_groups_gpu.quantise_launch
    run_on(choose(x, bits, group, codes, scales, lows, flag), x)
    if bool(flag):
        raise ValueError(CANNOT)
    return codes, scales, lows


@dequantise_groups.register_kernel("cuda")
def dequantise_groups_cuda(
    codes: Tensor, scales: Tensor, lows: Tensor,
    bits: int, group: int, channels: bool, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Undo it in one launch."""
    c, s, low = codes.contiguous(), scales.contiguous(), lows.contiguous()
    x = codes.new_empty(*codes.shape[:-1], width, dtype=dtype)
    aligned = all(part.data_ptr() % 16 == 0 for part in (c, s, low))
    if not _fits(x, bits, group, channels) or not aligned or not codes.numel() or not usable():
        return by_way_of_host(dequantise_groups, [c, s, low], bits, group, channels, width, dtype)
    choose = int_channels_gpu.dequantise_launch if channels else int_groups_gpu.dequantise_launch
    run_on(choose(c, s, low, bits, group, x), c)
    return x
