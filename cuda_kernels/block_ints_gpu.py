"""Blocks of whole numbers with a shared power of two, on a GPU: bit for bit `block_ints.py` and `micro_blocks.py`.

One thread for 16 bytes of the page; the lanes of a block agree by shuffles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes_gpu import (
    INFINITE,
    NANS,
    Launch,
    code_at,
    lanes_of,
    loader,
    magnitude_bits,
    placer,
    power,
    stores,
    vector_launch,
    worst,
)
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS

MICRO_BLOCK, NAN_SCALE = 16, 255
CODE_BYTES = (1, 2, 3, 4, 5, 6, 8)
TABLE = [
    {"lanes": 4, "bits": bits, "dtype": torch.bfloat16} for bits in (8, 4)
] + [{"lanes": 8, "bits": 6, "dtype": torch.float32}]  # fmt: skip
MICRO_TABLE = [
    {"magnitude": magnitude, "dtype": torch.bfloat16} for magnitude in (7, 4, 2)
] + [{"magnitude": 7, "dtype": torch.float32}]  # fmt: skip


@device_function
def _field_of(largest, v, width):
    """The exponent field of a block, infinities 254; a block that holds a NaN becomes zeros of field 255."""
    field = i32(min(i32(largest >> u32(23)), i32(254)))
    if largest > u32(INFINITE):
        field = i32(NAN_SCALE)
        for i in range(width):
            v[i] = f32(0)
    return field


@kernel(threads=256, table=TABLE)
def quantise_int_blocks(lanes, bits, dtype, threads):
    """Quantise blocks of `lanes` 16-byte pieces to two's complement."""
    width, size = VECTORS[dtype].width, VECTORS[dtype].width * bits // 8
    shift, top, mask, below = (
        (lanes - 1).bit_length(),
        (1 << bits - 1) - 1,
        (1 << bits) - 1,
        bits - 2,
    )
    load, worst_of, placed = loader(dtype, threads), worst(width, lanes), placer(width, bits)
    store, _ = stores(size)

    def body(x: u64, scales: u64, codes: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, _ = load(x, vectors, v)
        field = _field_of(worst_of(v), v, width)
        factor = power(i32(max(i32(i32(254) - max(i32(field - i32(below)), i32(1))), i32(0))))
        first, second = u32(0), u32(0)
        for i in range(width):
            whole = i32(min(max(ptx.nearest(f32(v[i] * factor)), i32(-top)), i32(top)))
            first, second = placed(first, second, i, u32(u32(whole) & u32(mask)))
        if inside:
            store(codes + u64(u32(at)) * u64(size), first, second)
            if (at & i32(lanes - 1)) == i32(0):
                ptx.st1(scales + u64(u32(at) >> u32(shift)), u32(field))

    return body


@kernel(threads=256, table=TABLE)
def dequantise_int_blocks(lanes, bits, dtype, threads):
    """Undo `quantise_int_blocks`."""
    width, _, pack = VECTORS[dtype]
    size, half, below = width * bits // 8, 1 << bits - 1, bits - 2
    shift, (_, load), code = (lanes - 1).bit_length(), stores(size), code_at(width, bits)
    nan = NANS[dtype]

    def body(scales: u64, codes: u64, x: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        if at >= vectors:
            return
        first, second = load(codes + u64(u32(at)) * u64(size))
        field = i32(ptx.ld1(scales + u64(u32(at) >> u32(shift))))
        factor = power(i32(max(i32(field - i32(below)), i32(1))))
        v = ptx.local(width, f32)
        for i in range(width):
            whole = i32(i32(code(first, second, i) ^ u32(half)) - i32(half))
            v[i] = f32(ptx.f32_of(whole) * factor)
        a, b, c, d = pack(v, 0)
        if field == i32(NAN_SCALE):
            a, b, c, d = u32(nan), u32(nan), u32(nan), u32(nan)
        ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


@kernel(threads=256, table=MICRO_TABLE)
def quantise_micro_blocks(magnitude, dtype, threads):
    """Quantise blocks of 16 whose pairs may have one exponent less: sizes, and a sign above them."""
    width, bits, top = VECTORS[dtype].width, magnitude + 1, (1 << magnitude) - 1
    lanes, pairs_of, below = MICRO_BLOCK // width, width // 2, magnitude - 1
    shift, size = (lanes - 1).bit_length(), width * bits // 8
    load, worst_of, placed = loader(dtype, threads), worst(width, lanes), placer(width, bits)
    store, _ = stores(size)

    def body(x: u64, scales: u64, pairs: u64, codes: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, held = load(x, vectors, v)
        field = _field_of(worst_of(v), v, width)
        first, second, less = u32(0), u32(0), u32(0)
        for j in range(pairs_of):
            own = u32(max(magnitude_bits(v[2 * j]), magnitude_bits(v[2 * j + 1])))
            lesser = i32(1) if i32(own >> u32(23)) < field else i32(0)
            less = u32(less | (u32(lesser) << u32(j)))
            step = i32(max(i32(i32(field - lesser) - i32(below)), i32(1)))
            factor = power(i32(i32(254) - step))
            for odd in range(2):
                value = v[2 * j + odd]
                near = ptx.nearest(f32(ptx.magnitude(value) * factor))
                code = u32(u32(ptx.as_u32(value) >> u32(31)) << u32(magnitude))
                code = u32(code | u32(min(near, i32(top))))
                first, second = placed(first, second, 2 * j + odd, code)
        less = u32(less << u32(i32(held & i32(lanes - 1)) * i32(pairs_of)))
        for step in range(shift):
            less = u32(less | ptx.shuffle_xor_u32(less, i32(1 << step)))
        if inside:
            store(codes + u64(u32(at)) * u64(size), first, second)
            if (at & i32(lanes - 1)) == i32(0):
                ptx.st1(scales + u64(u32(at) >> u32(shift)), u32(field))
                ptx.st1(pairs + u64(u32(at) >> u32(shift)), less)

    return body


@kernel(threads=256, table=MICRO_TABLE)
def dequantise_micro_blocks(magnitude, dtype, threads):
    """Undo `quantise_micro_blocks`."""
    width, _, pack = VECTORS[dtype]
    bits, mask, below = magnitude + 1, (1 << magnitude) - 1, magnitude - 1
    lanes, pairs_of, size = MICRO_BLOCK // width, width // 2, width * bits // 8
    shift, (_, load), code = (lanes - 1).bit_length(), stores(size), code_at(width, bits)
    nan = NANS[dtype]

    def body(scales: u64, pairs: u64, codes: u64, x: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        if at >= vectors:
            return
        first, second = load(codes + u64(u32(at)) * u64(size))
        field = i32(ptx.ld1(scales + u64(u32(at) >> u32(shift))))
        less = ptx.ld1(pairs + u64(u32(at) >> u32(shift)))
        less = u32(less >> u32(i32(at & i32(lanes - 1)) * i32(pairs_of)))
        v = ptx.local(width, f32)
        for j in range(pairs_of):
            lesser = i32(u32(less >> u32(j)) & u32(1))
            step = i32(max(i32(i32(field - lesser) - i32(below)), i32(1)))
            factor = power(i32(min(step, i32(254))))
            for odd in range(2):
                held = code(first, second, 2 * j + odd)
                value = f32(ptx.f32_of(i32(held & u32(mask))) * factor)
                v[2 * j + odd] = f32(-value) if held > u32(mask) else value
        a, b, c, d = pack(v, 0)
        if field == i32(NAN_SCALE):
            a, b, c, d = u32(nan), u32(nan), u32(nan), u32(nan)
        ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def serves(dtype: torch.dtype, width: int, bits: int, block: int) -> bool:
    """Say whether the kernels take such rows: whole blocks, and a thread's codes whole bytes."""
    if not lanes_of(dtype, block) or width % block:
        return False
    size, rest = divmod(VECTORS[dtype].width * bits, 8)
    return rest == 0 and size in CODE_BYTES


def quantise_blocks_launch(
    x: Tensor, bits: int, block: int, scales: Tensor, codes: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = quantise_int_blocks(lanes=lanes_of(x.dtype, block), bits=bits, dtype=x.dtype)
    return vector_launch(variant, x, (x, scales, codes))


def dequantise_blocks_launch(
    scales: Tensor, codes: Tensor, bits: int, block: int, x: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = dequantise_int_blocks(lanes=lanes_of(x.dtype, block), bits=bits, dtype=x.dtype)
    return vector_launch(variant, x, (scales, codes, x))


def quantise_micro_launch(
    x: Tensor, magnitude: int, scales: Tensor, pairs: Tensor, codes: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = quantise_micro_blocks(magnitude=magnitude, dtype=x.dtype)
    return vector_launch(variant, x, (x, scales, pairs, codes))


def dequantise_micro_launch(
    scales: Tensor, pairs: Tensor, codes: Tensor, magnitude: int, x: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = dequantise_micro_blocks(magnitude=magnitude, dtype=x.dtype)
    return vector_launch(variant, x, (scales, pairs, codes, x))
