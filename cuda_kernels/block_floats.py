"""Blocks of small floats with a shared power of two: OCP MX.

Source: OCP Microscaling Formats v1.0 section 6.3, as torchao computes it, bit for bit; blocks lie along the last dim
and the last one of a row may be shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .bits import packed_width
from .block_floats_gpu import dequantise_mx_launch, quantise_mx_launch, serves
from .block_runs import (
    RUN,
    clear_blocks,
    pack_blocks,
    power,
    round_run,
    spread,
    unpack_blocks,
    widen_all,
    widen_codes,
    worst_of_blocks,
)
from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
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


@njit(nogil=True)
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


@njit(nogil=True)
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


@njit(nogil=True)
def _mx_factors(scales, factors):
    for b in range(scales.size):
        value = power(np.int32(scales[b]))
        factors[b] = np.float32(np.nan) if scales[b] == NAN_SCALE else value


@njit(nogil=True)
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
    kind, rounding = MINIFLOATS[form], rounding_of(form)
    lift, top = np.int32(lift_of(rule, kind.mantissa_bits)), np.int32(kind.top_exponent)

    def quantise(which: slice, rows: np.ndarray, found: np.ndarray) -> None:
        _quantise_mx(rows, lift, top, rounding, scales[which].reshape(-1), found)

    pack_blocks(quantise, bits_of(x), MX_BLOCK, kind.bits, codes)


def dequantise_mx_into(scales: np.ndarray, codes: np.ndarray, form: str, x: Tensor) -> None:
    """Undo `quantise_mx_into`; a block of scale NaN is NaN."""
    how = float16_of(form)

    def dequantise(which: slice, found: np.ndarray, rows: np.ndarray) -> None:
        _dequantise_mx(found, how, scales[which].reshape(-1), rows)

    unpack_blocks(dequantise, codes, MX_BLOCK, MINIFLOATS[form].bits, bits_of(x))


@torch.library.custom_op("plait::quantise_mx", mutates_args=())
def quantise_mx(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    """Quantise rows to OCP MX floats: scales (exponents, bias 127; 255 is NaN) and packed codes.

    Args:
        form: one of `MINIFLOATS`.
        rule: how the scale is chosen: "floor", "even" or "ceil"; see `lift_of`.

    Shape: x `[rows, width]` -> scales `[rows, ceil(width / 32)]`, codes `[rows, packed_width]` uint8
    """
    (scales, codes), _ = coded_on_host(
        lambda x, *parts: quantise_mx_into(x, form, rule, *parts),
        x, rooms(x, MX_BLOCK, MINIFLOATS[form].bits),
    )  # fmt: skip
    return scales, codes


@quantise_mx.register_fake
def _(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    return rooms(x, MX_BLOCK, MINIFLOATS[form].bits)


@torch.library.custom_op("plait::dequantise_mx", mutates_args=())
def dequantise_mx(
    scales: Tensor, codes: Tensor, form: str, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_mx`. Shape: -> `[rows, width]` of the dtype."""
    return decoded_on_host(
        lambda s, c, x: dequantise_mx_into(s, c, form, x),
        (scales, codes), (codes.shape[0], width), dtype,
    )  # fmt: skip


@dequantise_mx.register_fake
def _(scales: Tensor, codes: Tensor, form: str, width: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@quantise_mx.register_kernel("cuda")
def quantise_mx_cuda(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    """Quantise whole blocks in one launch; what the kernel does not serve goes by way of the host."""
    x = x.contiguous()
    if not fits(x, x, serves(x.dtype, x.shape[-1], MX_BLOCK)):
        return by_way_of_host(quantise_mx, [x], form, rule)
    scales, codes = rooms(x, MX_BLOCK, MINIFLOATS[form].bits)
    lift = lift_of(rule, MINIFLOATS[form].mantissa_bits)
    run_on(quantise_mx_launch(x, form, lift, scales, codes), x)
    return scales, codes


@dequantise_mx.register_kernel("cuda")
def dequantise_mx_cuda(
    scales: Tensor, codes: Tensor, form: str, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    s, c = scales.contiguous(), codes.contiguous()
    x = c.new_empty(c.shape[0], width, dtype=dtype)
    if not fits(x, c, serves(dtype, width, MX_BLOCK)):
        return by_way_of_host(dequantise_mx, [s, c], form, width, dtype)
    run_on(dequantise_mx_launch(s, c, form, x), c)
    return x


def fits(x: Tensor, bytes_of: Tensor, served: bool) -> bool:
    """Say whether kernels that serve such rows take these, and can run."""
    aligned = x.data_ptr() % 16 == 0 and bytes_of.data_ptr() % 8 == 0
    return bool(x.numel()) and aligned and served and usable()


def rooms(x: Tensor, block: int, bits: int) -> tuple[Tensor, Tensor]:
    """Make room for scales of a byte for each block, and for packed codes."""
    rows, width = x.shape
    scales = x.new_empty(rows, -(-width // block), dtype=torch.uint8)
    return scales, x.new_empty(rows, packed_width(width, bits), dtype=torch.uint8)
