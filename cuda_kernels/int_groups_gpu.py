"""Groups of a token's channels to codes of 2, 4 or 8 bits and back, on a GPU: one thread for 16 bytes of the page.

What it makes is what `int_groups.py` makes on the CPU, bit for bit: the lanes of a group agree on its ends by shuffles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes_gpu import (
    Launch,
    code_at,
    inverse_of,
    lanes_of,
    loader,
    placer,
    product,
    quotient,
    stores,
    vector_launch,
)
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS

BITS = (2, 4, 8)
SMALL, LARGE = 2.0**-60, 2.0**60


@device_function
def _half_pair_bf16(low, high):
    return ptx.bf16x2(low, high)


@device_function
def _half_pair_f16(low, high):
    return ptx.f16x2(low, high)


HALVES = {
    torch.bfloat16: (_half_pair_bf16, ptx.bf16_low, ptx.bf16_high),
    torch.float16: (_half_pair_f16, ptx.f16_low, ptx.f16_high),
    torch.float32: (_half_pair_f16, ptx.f16_low, ptx.f16_high),
}
TABLE = [
    {"lanes": 4, "bits": bits, "dtype": torch.bfloat16} for bits in BITS
] + [{"lanes": 16, "bits": 4, "dtype": torch.float32}]  # fmt: skip


@device_function
def lifting(scale):
    """What to multiply a scale by so that neither it nor its inverse is subnormal."""
    lift = f32(1)
    if scale < f32(SMALL):
        lift = f32(LARGE * LARGE)
    elif scale > f32(LARGE):
        lift = f32(SMALL * SMALL)
    return lift


@device_function
def code_of(apart, lift, lifted, inverse, top):
    """Round apart / scale, as IEEE divides, to a code."""
    near = ptx.nearest(quotient(f32(apart * lift), lifted, inverse))
    return u32(min(max(near, i32(0)), i32(top)))


@kernel(threads=256, table=TABLE)
def quantise_int_rows(lanes, bits, dtype, threads):
    """Quantise groups of `lanes` 16-byte pieces; `flag` becomes 1 if a group cannot be coded."""
    width = VECTORS[dtype].width
    pair, low_of, high_of = HALVES[dtype]
    shift, top, size = (lanes - 1).bit_length(), (1 << bits) - 1, width * bits // 8
    load, placed, (store, _) = loader(dtype, threads), placer(width, bits), stores(size)
    top_inverse = 1 / top

    def body(x: u64, codes: u64, scales: u64, lows: u64, flag: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, _ = load(x, vectors, v)
        low, high, odd = v[0], v[0], f32(0)
        for i in range(width):
            low, high = ptx.smaller(low, v[i]), ptx.larger(high, v[i])
            odd += f32(v[i] - v[i])  # NaN if one is not finite
        for step in range(shift):
            low = ptx.smaller(low, ptx.shuffle_xor(low, i32(1 << step)))
            high = ptx.larger(high, ptx.shuffle_xor(high, i32(1 << step)))
        halves = pair(quotient(f32(high - low), f32(top), f32(top_inverse)), low)
        scale, low = low_of(halves), high_of(halves)
        if odd != f32(0) or f32(scale - scale) != f32(0) or f32(low - low) != f32(0):
            ptx.st4(flag, u32(1))
        lift = lifting(scale)
        lifted = f32(scale * lift)
        inverse = inverse_of(lifted)
        first, second = u32(0), u32(0)
        for i in range(width):
            code = u32(0)
            if scale > f32(0):
                code = code_of(f32(v[i] - low), lift, lifted, inverse, top)
            first, second = placed(first, second, i, code)
        if inside:
            store(codes + u64(u32(at)) * u64(size), first, second)
            if (at & i32(lanes - 1)) == i32(0):
                group = u64(u32(at) >> u32(shift)) * u64(2)
                ptx.st2(scales + group, u32(halves & u32(0xFFFF)))
                ptx.st2(lows + group, u32(halves >> u32(16)))

    return body


@kernel(threads=256, table=TABLE)
def dequantise_int_rows(lanes, bits, dtype, threads):
    """Undo `quantise_int_rows`."""
    width, _, pack = VECTORS[dtype]
    _, low_of, _ = HALVES[dtype]
    shift, size = (lanes - 1).bit_length(), width * bits // 8
    (_, load), code = stores(size), code_at(width, bits)

    def body(codes: u64, scales: u64, lows: u64, x: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        if at >= vectors:
            return
        first, second = load(codes + u64(u32(at)) * u64(size))
        group = u64(u32(at) >> u32(shift)) * u64(2)
        scale, low = low_of(ptx.ld2(scales + group)), low_of(ptx.ld2(lows + group))
        v = ptx.local(width, f32)
        for i in range(width):
            v[i] = f32(product(ptx.f32_of(i32(code(first, second, i))), scale) + low)
        a, b, c, d = pack(v, 0)
        ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def serves(dtype: torch.dtype, width: int, bits: int, group: int) -> bool:
    """Say whether the kernels take such rows: groups that are whole, and a power of two of 16-byte pieces to 32."""
    return bits in BITS and lanes_of(dtype, group) > 0 and width % group == 0


def quantise_launch(
    x: Tensor, bits: int, group: int, codes: Tensor, scales: Tensor, lows: Tensor, flag: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = quantise_int_rows(lanes=lanes_of(x.dtype, group), bits=bits, dtype=x.dtype)
    return vector_launch(variant, x, (x, codes, scales, lows, flag))


def dequantise_launch(
    codes: Tensor, scales: Tensor, lows: Tensor, bits: int, group: int, x: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = dequantise_int_rows(lanes=lanes_of(x.dtype, group), bits=bits, dtype=x.dtype)
    return vector_launch(variant, x, (codes, scales, lows, x))
