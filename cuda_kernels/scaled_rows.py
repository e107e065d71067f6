"""Rows of eight bits with a float32 scale each: e4m3, or whole numbers from -127 to 127.

scale = max |x| / largest;  code = round(x / scale);  a row whose scale would be subnormal becomes zeros
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .bits import pack_tiles, unpack_tiles
from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .halves import narrow_result, widen
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .minifloats import round_to, rounding_of
from .numbers import bits_of, widen_run
from .scaled_rows_gpu import dequantise_launch, quantise_launch, serves

TINY = np.float32(2.0**-126)
CANNOT = "quantise_scaled: infinities or NaN"


def scaled_reference(x: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Quantise in plain torch. Shape: `[rows, width]` -> codes (int8 or float8_e4m3fn), scales `[rows]` float32"""
    largest = 127.0 if whole else 448.0
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True) / largest
    scale = torch.where(scale >= float(TINY), scale, 0)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    scaled = (wide * inverse).clamp(-largest, largest)
    codes = scaled.round().to(torch.int8) if whole else scaled.to(torch.float8_e4m3fn)
    return codes, scale[:, 0]


@njit(nogil=True)
def _whole_row(wide, inverse, codes):
    for i in range(wide.size):
        code = min(max(np.rint(wide[i] * inverse), np.float32(-127)), np.float32(127))
        codes[i] = np.uint8(np.int32(code) & np.int32(255))


@njit(nogil=True)
def _float_row(wide, inverse, form, codes):
    lowest, largest, lift, unit, sign = form
    for i in range(wide.size):
        codes[i] = round_to(wide[i] * inverse, lowest, largest, lift, unit, sign)


@njit(nogil=True)
def _quantise(x, whole, form, scales, codes):
    """Shape: x, codes `[rows, width]`, scales `[rows]` float32; give how many rows are not finite."""
    rows, width = x.shape
    wide, bad = np.empty(width, np.float32), 0
    largest = np.float32(127) if whole else np.float32(448)
    for r in range(rows):
        worst = widen_run(x[r], wide)
        bad += worst >= 0x7F800000
        scale = np.float32(np.uint32(worst).view(np.float32) / largest)
        scale = scale if scale >= TINY else np.float32(0)
        scales[r] = scale
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        if whole:
            _whole_row(wide, inverse, codes[r])
        else:
            _float_row(wide, inverse, form, codes[r])
    return bad


@njit(nogil=True)
def _widen_e4m3(code):
    """Give an e4m3's value over 256: of its NaN, which no encoder here writes, as if it were a number."""
    return widen(np.int16(np.int16(np.int16(np.int8(code)) * np.int16(128)) & np.int16(-0x4001)))


@njit(nogil=True)
def _dequantise(codes, whole, scales, x):
    for r in range(codes.shape[0]):
        run, out, scale = codes[r], x[r], scales[r]
        if np.isnan(scale):
            scale = np.float32(np.nan)  # damaged; `narrow_result` wants this one
        if whole:
            for i in range(run.size):
                out[i] = narrow_result(np.float32(np.int8(run[i])) * scale, x)
        else:
            for i in range(run.size):
                out[i] = narrow_result(_widen_e4m3(run[i]) * np.float32(256) * scale, x)


def quantise_rows_into(x: Tensor, whole: bool, scales: np.ndarray, codes: np.ndarray) -> bool:
    """Code contiguous rows in host memory; say whether all elements were finite.

    Shape: x `[rows, width]` -> scales `[rows]` float32, codes `[rows, width]` uint8
    """
    source, form, bad = bits_of(x), rounding_of("e4m3"), []
    pack_tiles(
        lambda a, b, tile: bad.append(_quantise(source[a:b], whole, form, scales[a:b], tile)),
        source.shape, 8, codes,
    )  # fmt: skip
    return not any(bad)


def dequantise_rows_into(scales: np.ndarray, codes: np.ndarray, whole: bool, x: Tensor) -> None:
    """Undo `quantise_rows_into`."""
    target = bits_of(x)
    unpack_tiles(
        lambda a, b, tile: _dequantise(tile, whole, scales[a:b], target[a:b]),
        target.shape, 8, codes,
    )  # fmt: skip


@torch.library.custom_op("plait::quantise_scaled", mutates_args=())
def quantise_scaled(x: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Quantise rows to eight bits, whole numbers or e4m3, with a float32 scale each.

    Shape: x `[rows, width]` -> scales `[rows]`, codes `[rows, width]` uint8

    Raises:
        ValueError: an element is infinite or not a number.
    """
    parts, fine = coded_on_host(
        lambda x, *parts: quantise_rows_into(x, whole, *parts), x, _rooms(x, whole)
    )
    if not fine:
        raise ValueError(CANNOT)
    return parts[0], parts[1]


def _rooms(x: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), torch.empty_like(x, dtype=torch.uint8)


quantise_scaled.register_fake(_rooms)


@torch.library.custom_op("plait::dequantise_scaled", mutates_args=())
def dequantise_scaled(scales: Tensor, codes: Tensor, whole: bool, dtype: torch.dtype) -> Tensor:
    """Undo `quantise_scaled`. Shape: -> `[rows, width]` of the dtype"""
    return decoded_on_host(
        lambda s, c, x: dequantise_rows_into(s, c, whole, x), (scales, codes), codes.shape, dtype
    )


@dequantise_scaled.register_fake
def _(scales: Tensor, codes: Tensor, whole: bool, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@quantise_scaled.register_kernel("cuda")
def quantise_scaled_cuda(x: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Quantise rows in one launch; what the kernel does not serve goes by way of the host."""
    x = x.contiguous()
    fits = serves(x.dtype, x.shape[-1]) and x.data_ptr() % 16 == 0
    if not fits or not x.numel() or not usable():
        return by_way_of_host(quantise_scaled, [x], whole)
    scales, codes = _rooms(x, whole)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    run_on(quantise_launch(x, whole, scales, codes, flag), x)
    if bool(flag):
        raise ValueError(CANNOT)
    return scales, codes


@dequantise_scaled.register_kernel("cuda")
def dequantise_scaled_cuda(
    scales: Tensor, codes: Tensor, whole: bool, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, c = scales.contiguous(), codes.contiguous()
    fits = serves(dtype, c.shape[-1]) and c.data_ptr() % 8 == 0
    if not fits or not c.numel() or not usable():
        return by_way_of_host(dequantise_scaled, [s, c], whole, dtype)
    x = torch.empty_like(c, dtype=dtype)
    run_on(dequantise_launch(s, c, whole, x), c)
    return x
