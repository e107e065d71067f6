"""Rows of eight bits with a float32 scale each, on a GPU: what `scaled_rows.py` makes on the CPU, bit for bit.

One thread for 16 bytes of the page; the lanes of a row agree on its largest magnitude by shuffles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes_gpu import (
    INFINITE,
    decoder,
    encoder,
    inverse_of,
    magnitude_bits,
    pair_at,
    quotient,
    stores,
)
from .gpu import ptx
from .gpu.kernel import Variant, kernel
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
    width, unpack, _ = VECTORS[dtype]
    shift, (store, _) = (lanes - 1).bit_length(), stores(width)
    code_of, largest = (_whole_code, 127.0) if whole else (encoder("e4m3"), 448.0)
    inverse_largest = 1 / largest

    def body(x: u64, scales: u64, codes: u64, flag: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        inside = at < vectors
        held = at if inside else i32(vectors - i32(1))  # every lane takes part in the shuffles
        a, b, c, d = ptx.ld16_once(x + u64(u32(held)) * u64(16))
        v = ptx.local(width, f32)
        unpack(a, b, c, d, v, 0)
        worst = u32(0)
        for i in range(width):
            worst = u32(max(worst, magnitude_bits(v[i])))
        for step in range(shift):
            worst = u32(max(worst, ptx.shuffle_xor_u32(worst, i32(1 << step))))
        if worst >= u32(INFINITE):
            ptx.st4(flag, u32(1))
        scale = quotient(ptx.as_f32(worst), f32(largest), f32(inverse_largest))
        inverse = f32(0)
        if scale >= f32(TINY):
            inverse = inverse_of(scale)
        else:
            scale = f32(0)
        first, second = u32(0), u32(0)
        for i in range(width):
            code = code_of(f32(v[i] * inverse))
            if i < 4:
                first = u32(first | (code << u32(i * 8)))
            else:
                second = u32(second | (code << u32((i - 4) * 8)))
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
    lanes, rest = divmod(width * dtype.itemsize, 16)
    return dtype in VECTORS and rest == 0 and lanes in (1, 2, 4, 8, 16, 32)


def quantise_launch(
    x: Tensor, whole: bool, scales: Tensor, codes: Tensor, flag: Tensor
) -> tuple[Variant, int, tuple[int, ...]]:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    lanes, vectors = x.shape[-1] * x.element_size() // 16, x.numel() * x.element_size() // 16
    variant = quantise_scaled_rows(lanes=lanes, whole=whole, dtype=x.dtype)
    pointers = tuple(t.data_ptr() for t in (x, scales, codes, flag))
    return variant, -(-vectors // variant.threads), (*pointers, vectors)


def dequantise_launch(
    scales: Tensor, codes: Tensor, whole: bool, x: Tensor
) -> tuple[Variant, int, tuple[int, ...]]:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    lanes, vectors = x.shape[-1] * x.element_size() // 16, x.numel() * x.element_size() // 16
    variant = dequantise_scaled_rows(lanes=lanes, whole=whole, dtype=x.dtype)
    pointers = tuple(t.data_ptr() for t in (scales, codes, x))
    return variant, -(-vectors // variant.threads), (*pointers, vectors)
