"""Rows of eight bits with a float32 scale each, on a GPU: what `scaled_rows.py` makes on the CPU, bit for bit.

One thread for 16 bytes of the page; the lanes of a row agree on its largest magnitude by shuffles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes_gpu import (
    INFINITE,
    Launch,
    decoder,
    encoder,
    inverse_of,
    lanes_of,
    loader,
    pair_at,
    placer,
    quotient,
    stores,
    vector_launch,
    worst,
)
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS

TINY = 2.0**-126
TABLE = [
    {"lanes": 16, "whole": whole, "dtype": torch.bfloat16} for whole in (False, True)
] + [{"lanes": 32, "whole": False, "dtype": torch.float32}]  # fmt: skip


@device_function
def _whole_code(value):
    near = ptx.nearest(value)
    return u32(u32(min(max(near, i32(-127)), i32(127))) & u32(255))


@device_function
def _whole_values(pair):
    low, high = i32(pair & u32(0xFF)), i32(pair >> u32(16))
    low = i32(low - i32(256)) if low > i32(127) else low
    high = i32(high - i32(256)) if high > i32(127) else high
    return ptx.f32_of(low), ptx.f32_of(high)


@kernel(threads=256, table=TABLE)
def quantise_scaled_rows(lanes, whole, dtype, threads):
    """Quantise rows of `lanes` 16-byte pieces; `flag` becomes 1 if an element is not finite."""
    width = VECTORS[dtype].width
    shift, (store, _) = (lanes - 1).bit_length(), stores(width)
    load, worst_of, placed = loader(dtype, threads), worst(width, lanes), placer(width, 8)
    code_of, largest = (_whole_code, 127.0) if whole else (encoder("e4m3"), 448.0)
    inverse_largest = 1 / largest

    def body(x: u64, scales: u64, codes: u64, flag: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, _ = load(x, vectors, v)
        most = worst_of(v)
        if most >= u32(INFINITE):
            ptx.st4(flag, u32(1))
        scale = quotient(ptx.as_f32(most), f32(largest), f32(inverse_largest))
        inverse = f32(0)
        if scale >= f32(TINY):
            inverse = inverse_of(scale)
        else:
            scale = f32(0)
        first, second = u32(0), u32(0)
        for i in range(width):
            first, second = placed(first, second, i, code_of(f32(v[i] * inverse)))
        if inside:
            store(codes + u64(u32(at)) * u64(width), first, second)
            if (at & i32(lanes - 1)) == i32(0):
                ptx.st_f32(scales + u64(u32(at) >> u32(shift)) * u64(4), scale)

    return body


@kernel(threads=256, table=TABLE)
def dequantise_scaled_rows(lanes, whole, dtype, threads):
    """Undo `quantise_scaled_rows`."""
    width, _, pack = VECTORS[dtype]
    shift, (_, load) = (lanes - 1).bit_length(), stores(width)
    values_of, pair = _whole_values if whole else decoder("e4m3"), pair_at(width, 8)

    def body(scales: u64, codes: u64, x: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        if at >= vectors:
            return
        first, second = load(codes + u64(u32(at)) * u64(width))
        scale = ptx.ld_f32(scales + u64(u32(at) >> u32(shift)) * u64(4))
        v = ptx.local(width, f32)
        for j in range(width // 2):
            low, high = values_of(pair(first, second, 2 * j))
            v[2 * j], v[2 * j + 1] = f32(low * scale), f32(high * scale)
        a, b, c, d = pack(v, 0)
        ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def serves(dtype: torch.dtype, width: int) -> bool:
    """Say whether the kernels take such rows: a power of two of 16-byte pieces, to 32."""
    return lanes_of(dtype, width) > 0


def quantise_launch(x: Tensor, whole: bool, scales: Tensor, codes: Tensor, flag: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    lanes = lanes_of(x.dtype, x.shape[-1])
    variant = quantise_scaled_rows(lanes=lanes, whole=whole, dtype=x.dtype)
    return vector_launch(variant, x, (x, scales, codes, flag))


def dequantise_launch(scales: Tensor, codes: Tensor, whole: bool, x: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    lanes = lanes_of(x.dtype, x.shape[-1])
    variant = dequantise_scaled_rows(lanes=lanes, whole=whole, dtype=x.dtype)
    return vector_launch(variant, x, (scales, codes, x))
