"""Blocks of small floats with a shared scale, on a GPU: what `block_floats.py` makes on the CPU, bit for bit.

One thread for 16 bytes of the page; the lanes of a block (4 or 8 in MX, 2 or 4 in NVFP4) agree by shuffles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .codes_gpu import (
    INFINITE,
    NANS,
    Launch,
    decoder,
    encoder,
    inverse_of,
    loader,
    pair_at,
    placer,
    power,
    product,
    quotient,
    stores,
    vector_launch,
    worst,
)
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .minifloats import MINIFLOATS

MX_BLOCK, NVFP4_BLOCK, NAN_SCALE = 32, 16, 255
LARGEST = float(np.finfo(np.float32).max)
MX_TABLE: list[dict[str, Any]] = [
    {"form": form, "lift": 0, "dtype": torch.bfloat16} for form in MINIFLOATS
] + [{"form": "e2m3", "lift": 0, "dtype": torch.float32}]  # fmt: skip
MX_TABLE_BACK = [{k: v for k, v in entry.items() if k != "lift"} for entry in MX_TABLE]
NVFP4_TABLE = [
    {"both": both, "dtype": torch.bfloat16} for both in (False, True)
] + [{"both": True, "dtype": torch.float32}]  # fmt: skip


def _coder(form: str, width: int) -> Any:
    """Give what codes a thread's numbers times a factor, into two words."""
    code_of, placed = encoder(form), placer(width, MINIFLOATS[form].bits)

    @device_function
    def code_all(v, factor):
        first, second = u32(0), u32(0)
        for i in range(width):
            first, second = placed(first, second, i, code_of(f32(v[i] * factor)))
        return first, second

    return code_all


@kernel(threads=256, table=MX_TABLE)
def quantise_mx_blocks(form, lift, dtype, threads):
    """Quantise blocks of 32; `lift` as `block_floats.lift_of` has it."""
    kind, width = MINIFLOATS[form], VECTORS[dtype].width
    shift, size = (MX_BLOCK // width - 1).bit_length(), width * kind.bits // 8
    lanes, top, (store, _) = MX_BLOCK // width, kind.top_exponent, stores(size)
    worst_of, code_all, load = worst(width, lanes), _coder(form, width), loader(dtype, threads)

    def body(x: u64, scales: u64, codes: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, _ = load(x, vectors, v)
        most = worst_of(v)
        field = i32(i32(u32(most + u32(lift)) >> u32(23)) - i32(top))
        field = i32(min(max(field, i32(0)), i32(254)))
        first, second = code_all(v, power(i32(i32(254) - field)))
        if most > u32(INFINITE):
            field, first, second = i32(NAN_SCALE), u32(0), u32(0)
        if inside:
            store(codes + u64(u32(at)) * u64(size), first, second)
            if (at & i32(lanes - 1)) == i32(0):
                ptx.st1(scales + u64(u32(at) >> u32(shift)), u32(field))

    return body


@kernel(threads=256, table=MX_TABLE_BACK)
def dequantise_mx_blocks(form, dtype, threads):
    """Undo `quantise_mx_blocks`."""
    kind, (width, _, pack) = MINIFLOATS[form], VECTORS[dtype]
    shift, size = (MX_BLOCK // width - 1).bit_length(), width * kind.bits // 8
    (_, load), values_of, pair = stores(size), decoder(form), pair_at(width, kind.bits)
    nan = NANS[dtype]

    def body(scales: u64, codes: u64, x: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        if at >= vectors:
            return
        first, second = load(codes + u64(u32(at)) * u64(size))
        field = i32(ptx.ld1(scales + u64(u32(at) >> u32(shift))))
        factor = power(field)
        v = ptx.local(width, f32)
        for j in range(width // 2):
            low, high = values_of(pair(first, second, 2 * j))
            v[2 * j], v[2 * j + 1] = f32(low * factor), f32(high * factor)
        a, b, c, d = pack(v, 0)
        if field == i32(NAN_SCALE):
            a, b, c, d = u32(nan), u32(nan), u32(nan), u32(nan)
        ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def _try_scale(width: int) -> Any:
    """Give what codes a block with a scale for a largest element of `top`."""
    code_all, code_of, value_of = _coder("e2m1", width), encoder("e4m3"), decoder("e4m3")

    @device_function
    def attempt(v, most, top, inverse_top, inverse, whole_up, inverse_up, lift):
        wish = quotient(f32(ptx.as_f32(most) * lift), top, inverse_top)
        near = f32(wish * inverse_up)
        if near < f32(1024):  # beyond it saturates anyway, and the steps of a quotient overflow
            near = quotient(wish, whole_up, inverse_up)
        if near > f32(2.0**-6):
            wish = near
        else:
            wish = f32(2.0**-6)
        scale = code_of(wish)
        size, _ = value_of(scale)
        back = inverse_of(size)
        factor = f32(inverse * back)
        if factor < f32(2.0**120):
            factor = quotient(inverse, size, back)
        factor = ptx.smaller(factor, f32(LARGEST))
        first, _ = code_all(v, factor)
        return scale, size, factor, first

    return attempt


def _misses(width: int, shift: int) -> Any:
    """Give what adds the squared errors of a block, neighbours first."""
    values_of, pair = decoder("e2m1"), pair_at(width, 4)

    @device_function
    def misses_of(v, factor, codes):
        parts = ptx.local(width, f32)
        for j in range(width // 2):
            low, high = values_of(pair(codes, u32(0), 2 * j))
            parts[2 * j] = f32(product(v[2 * j], factor) - low)
            parts[2 * j + 1] = f32(product(v[2 * j + 1], factor) - high)
        for i in range(width):
            parts[i] = product(parts[i], parts[i])
        for i in range(width // 2):
            parts[i] = f32(parts[2 * i] + parts[2 * i + 1])
        for i in range(width // 4):
            parts[i] = f32(parts[2 * i] + parts[2 * i + 1])
        total = parts[0]
        if width == 8:
            total = f32(parts[0] + parts[1])
        for step in range(shift):
            total = f32(total + ptx.shuffle_xor(total, i32(1 << step)))
        return total

    return misses_of


@kernel(threads=256, table=NVFP4_TABLE)
def quantise_nvfp4_blocks(both, dtype, threads):
    """Quantise blocks of 16; the launch has the page's scale, what it is lifted by, and the inverses."""
    width = VECTORS[dtype].width
    lanes, size = NVFP4_BLOCK // width, width // 2
    shift, (store, _) = (lanes - 1).bit_length(), stores(size)
    load, worst_of = loader(dtype, threads), worst(width, lanes)
    attempt, misses_of = _try_scale(width), _misses(width, shift)

    def body(
        x: u64, scales: u64, codes: u64, vectors: i32,
        inverse: f32, whole_up: f32, inverse_up: f32, lift: f32,
    ):  # fmt: skip
        v = ptx.local(width, f32)
        at, inside, _ = load(x, vectors, v)
        most = worst_of(v)
        scale, size_6, factor, first = attempt(
            v, most, f32(6), f32(1 / 6), inverse, whole_up, inverse_up, lift
        )
        if both:
            other, size_4, factor_4, first_4 = attempt(
                v, most, f32(4), f32(1 / 4), inverse, whole_up, inverse_up, lift
            )
            here = f32(f32(misses_of(v, factor, first) * size_6) * size_6)
            there = f32(f32(misses_of(v, factor_4, first_4) * size_4) * size_4)
            if there < here:
                scale, first = other, first_4
        if inside:
            store(codes + u64(u32(at)) * u64(size), first, u32(0))
            if (at & i32(lanes - 1)) == i32(0):
                ptx.st1(scales + u64(u32(at) >> u32(shift)), scale)

    return body


@kernel(threads=256, table=[{"dtype": torch.bfloat16}, {"dtype": torch.float32}])
def dequantise_nvfp4_blocks(dtype, threads):
    """Undo `quantise_nvfp4_blocks`."""
    width, _, pack = VECTORS[dtype]
    shift, size = (NVFP4_BLOCK // width - 1).bit_length(), width // 2
    (_, load), values_of, scale_of = stores(size), decoder("e2m1"), decoder("e4m3")
    pair = pair_at(width, 4)

    def body(scales: u64, codes: u64, x: u64, vectors: i32, whole: f32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        if at >= vectors:
            return
        first, second = load(codes + u64(u32(at)) * u64(size))
        scale, _ = scale_of(ptx.ld1(scales + u64(u32(at) >> u32(shift))))
        factor = f32(scale * whole)
        v = ptx.local(width, f32)
        for j in range(width // 2):
            low, high = values_of(pair(first, second, 2 * j))
            v[2 * j], v[2 * j + 1] = f32(low * factor), f32(high * factor)
        a, b, c, d = pack(v, 0)
        ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def serves(dtype: torch.dtype, width: int, block: int) -> bool:
    """Say whether the kernels take such rows: whole blocks."""
    return dtype in VECTORS and width % block == 0


def quantise_mx_launch(x: Tensor, form: str, lift: int, scales: Tensor, codes: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = quantise_mx_blocks(form=form, lift=lift, dtype=x.dtype)
    return vector_launch(variant, x, (x, scales, codes))


def dequantise_mx_launch(scales: Tensor, codes: Tensor, form: str, x: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    return vector_launch(dequantise_mx_blocks(form=form, dtype=x.dtype), x, (scales, codes, x))


def quantise_nvfp4_launch(
    x: Tensor, whole: float, lift: float, both: bool, scales: Tensor, codes: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments; `lift` as `block_floats.nvfp4_lift` has it."""
    variant = quantise_nvfp4_blocks(both=both, dtype=x.dtype)
    one, up = np.float32(1), np.float32(whole) * np.float32(lift)
    numbers = (one / np.float32(whole), up, one / up, lift)
    return vector_launch(variant, x, (x, scales, codes), *map(float, numbers))


def dequantise_nvfp4_launch(scales: Tensor, codes: Tensor, whole: float, x: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    return vector_launch(dequantise_nvfp4_blocks(dtype=x.dtype), x, (scales, codes, x), whole)
