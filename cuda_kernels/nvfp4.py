"""NVFP4: blocks of 16 floats of four bits with a scale in e4m3, and a float32 for all.

Source: NVFP4 as torchao computes it, bit for bit; blocks lie along the last dim and the last one of a row may be
shorter. With `both`, "Four over six" (arXiv 2512.02010).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .block_floats import fits, rooms
from .block_floats_gpu import dequantise_nvfp4_launch, quantise_nvfp4_launch, serves
from .block_runs import (
    RUN,
    pack_blocks,
    round_run,
    spread,
    unpack_blocks,
    widen_all,
    widen_codes,
    worst_of_blocks,
)
from .gpu.kernel import run_on
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .minifloats import float16_of, round_to, rounding_of, widen_code
from .numbers import bits_of

NVFP4_BLOCK = 16
LARGEST = np.finfo(np.float32).max


@njit(nogil=True, error_model="numpy")
def _nvfp4_scales(worst, top, whole, lift, forms, scales, sizes, factors):
    """Choose scales for a largest element of `top`: codes of e4m3, their values, what to multiply elements by."""
    lowest, largest, lift, unit, sign = forms[0]
    back, size_bits, sign_lift, end, bias = forms[1]
    inverse, whole = np.float32(np.float32(1) / whole), np.float32(whole * lift)
    for b in range(worst.size):
        wish = np.float32(np.float32(np.int32(worst[b]).view(np.float32) * lift) / top)
        wish = np.float32(wish / whole)
        wish = wish if wish > np.float32(2.0**-6) else np.float32(2.0**-6)
        code = round_to(wish, lowest, largest, lift, unit, sign)
        size = np.float32(widen_code(code, back, size_bits, sign_lift, end) * bias)
        factor = np.float32(inverse / size)
        factors[b] = factor if factor < LARGEST else LARGEST
        scales[b], sizes[b] = code, size


@njit(nogil=True)
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


@njit(nogil=True)
def _add_pairs(parts, sums):
    for i in range(sums.size):
        sums[i] = parts[2 * i] + parts[2 * i + 1]


@njit(nogil=True)
def _choose(sizes, misses, better, mask):
    for b in range(mask.size):
        six = misses[0, b] * sizes[0, b] * sizes[0, b]
        four = misses[1, b] * sizes[1, b] * sizes[1, b]
        mask[b] = np.uint8(255) if four < six else np.uint8(0)
        better[0, b] = better[1, b] if four < six else better[0, b]


@njit(nogil=True)
def _replace(mask, other, codes):
    for i in range(codes.size):
        codes[i] = np.uint8(codes[i] ^ np.uint8(np.uint8(codes[i] ^ other[i]) & mask[i]))


@njit(nogil=True)
def _quantise_nvfp4(x, whole, lift, both, forms, scales, codes):
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
            _nvfp4_scales(worst[:blocks], top, whole, lift, forms, chosen[way], sizes[way], factors)
            spread(factors[:blocks], NVFP4_BLOCK, steps[way])
            round_run(wide[:n], steps[way], forms[2], out)
            if both:
                _misses(wide, steps[way], out, forms[3], parts, more, misses[way, :blocks])
        if both:
            _choose(sizes, misses, chosen, taken[:blocks])
            spread(taken[:blocks], NVFP4_BLOCK, mask)
            _replace(mask, other, codes[a:b])
        for i in range(blocks):
            scales[first + i] = chosen[0, i]


@njit(nogil=True)
def _nvfp4_factors(scales, form, whole, factors):
    lift, size_bits, sign_lift, top, bias = form
    for b in range(scales.size):
        factors[b] = widen_code(scales[b], lift, size_bits, sign_lift, top) * bias * whole


@njit(nogil=True)
def _dequantise_nvfp4(codes, whole, forms, scales, x):
    steps, factors = np.empty(RUN, np.float32), np.empty(RUN // NVFP4_BLOCK, np.float32)
    for a in range(0, x.size, RUN):
        b = min(a + RUN, x.size)
        first, last = a // NVFP4_BLOCK, b // NVFP4_BLOCK
        _nvfp4_factors(scales[first:last], forms[0], whole, factors)
        spread(factors[: last - first], NVFP4_BLOCK, steps)
        widen_codes(codes[a:b], steps, forms[1], x[a:b])


def nvfp4_whole(x: Tensor) -> float:
    """The float32 scale of a page: its largest magnitude becomes 448 * 6. Not finite if an element is not."""
    least, most = x.detach().aminmax() if x.numel() else (torch.zeros(()), torch.zeros(()))
    whole = float(torch.maximum(-least, most).float() / (448.0 * 6.0))
    return 1.0 if whole < 2.0**-126 else whole


def nvfp4_lift(whole: float) -> float:
    """What to multiply by before a block's scale is chosen, so that no quotient on the way is subnormal."""
    return 2.0**64 if whole < 2.0**-60 else 1.0


def quantise_nvfp4_into(
    x: Tensor, whole: float, both: bool, scales: np.ndarray, codes: np.ndarray
) -> None:
    """Quantise contiguous rows in host memory into packed codes; see `quantise_nvfp4`."""
    g, lift = np.float32(whole), np.float32(nvfp4_lift(whole))
    forms = (rounding_of("e4m3"), float16_of("e4m3"), rounding_of("e2m1"), float16_of("e2m1"))

    def quantise(which: slice, rows: np.ndarray, found: np.ndarray) -> None:
        _quantise_nvfp4(rows, g, lift, both, forms, scales[which].reshape(-1), found)

    pack_blocks(quantise, bits_of(x), NVFP4_BLOCK, 4, codes)


def dequantise_nvfp4_into(scales: np.ndarray, codes: np.ndarray, whole: float, x: Tensor) -> None:
    """Undo `quantise_nvfp4_into`."""
    g = np.float32(whole if whole == whole else np.nan)
    forms = (float16_of("e4m3"), float16_of("e2m1"))

    def dequantise(which: slice, found: np.ndarray, rows: np.ndarray) -> None:
        _dequantise_nvfp4(found, g, forms, scales[which].reshape(-1), rows)

    unpack_blocks(dequantise, codes, NVFP4_BLOCK, 4, bits_of(x))


@torch.library.custom_op("plait::quantise_nvfp4", mutates_args=())
def quantise_nvfp4(x: Tensor, whole: float, both: bool) -> tuple[Tensor, Tensor]:
    """Quantise rows to NVFP4 under a given scale of all: scales (e4m3) and packed codes.

    Args:
        whole: float32 scale of everything; `nvfp4_whole(x)` or a calibrated one.
        both: try 4 as a block's largest element as well as 6.

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / 16)]`, codes `[rows, packed_width]` uint8
    """
    (scales, codes), _ = coded_on_host(
        lambda x, *parts: quantise_nvfp4_into(x, whole, both, *parts), x, rooms(x, NVFP4_BLOCK, 4)
    )
    return scales, codes


@quantise_nvfp4.register_fake
def _(x: Tensor, whole: float, both: bool) -> tuple[Tensor, Tensor]:
    return rooms(x, NVFP4_BLOCK, 4)


@torch.library.custom_op("plait::dequantise_nvfp4", mutates_args=())
def dequantise_nvfp4(
    scales: Tensor, codes: Tensor, whole: float, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_nvfp4`. Shape: -> `[rows, width]` of the dtype."""
    return decoded_on_host(
        lambda s, c, x: dequantise_nvfp4_into(s, c, whole, x),
        (scales, codes), (codes.shape[0], width), dtype,
    )  # fmt: skip


@dequantise_nvfp4.register_fake
def _(scales: Tensor, codes: Tensor, whole: float, width: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@quantise_nvfp4.register_kernel("cuda")
def quantise_nvfp4_cuda(x: Tensor, whole: float, both: bool) -> tuple[Tensor, Tensor]:
    """Quantise whole blocks in one launch."""
    x = x.contiguous()
    if not fits(x, x, serves(x.dtype, x.shape[-1], NVFP4_BLOCK)):
        return by_way_of_host(quantise_nvfp4, [x], whole, both)
    scales, codes = rooms(x, NVFP4_BLOCK, 4)
    run_on(quantise_nvfp4_launch(x, whole, nvfp4_lift(whole), both, scales, codes), x)
    return scales, codes


@dequantise_nvfp4.register_kernel("cuda")
def dequantise_nvfp4_cuda(
    scales: Tensor, codes: Tensor, whole: float, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, c = scales.contiguous(), codes.contiguous()
    x = c.new_empty(c.shape[0], width, dtype=dtype)
    if not fits(x, c, serves(dtype, width, NVFP4_BLOCK)):
        return by_way_of_host(dequantise_nvfp4, [s, c], whole, width, dtype)
    run_on(dequantise_nvfp4_launch(s, c, whole, x), c)
    return x
