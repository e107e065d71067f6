"""Lloyd-Max codes of randomly rotated rows, on a GPU: what `turbo.py` makes on the CPU, bit for bit.

One thread for 16 bytes of a row, as `hadamard_gpu.py` rotates it; the row's lanes add its squares by shuffles. Signs,
and bounds or levels behind them, come from a table in device memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codes_gpu import (
    INFINITE,
    Launch,
    code_at,
    inverse_of,
    lanes_of,
    loader,
    placer,
    power,
    product,
    quotient,
    root_of,
    stores,
    vector_launch,
    worst,
)
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .hadamard_gpu import turns
from .int_groups_gpu import HALVES

SMALLEST = 2.0**-120  # a norm that float32 can divide by
TABLE = [
    {"lanes": 16, "bits": bits, "dtype": torch.bfloat16} for bits in (3, 4, 2, 1)
] + [{"lanes": 32, "bits": 4, "dtype": torch.float32}]  # fmt: skip


def _squares(width: int, lanes: int):
    """Give what adds a row's squares, neighbours first."""
    levels, shift = width.bit_length() - 1, (lanes - 1).bit_length()

    @device_function
    def squares_of(v):
        parts = ptx.local(width, f32)
        for i in range(width):
            parts[i] = product(v[i], v[i])
        for level in range(levels):
            for i in range(width):
                if i < width >> (level + 1):
                    parts[i] = f32(parts[2 * i] + parts[2 * i + 1])
        total = parts[0]
        for step in range(shift):
            total = f32(total + ptx.shuffle_xor(total, i32(1 << step)))
        return total

    return squares_of


@kernel(threads=256, table=TABLE)
def quantise_turbo_rows(lanes, bits, dtype, threads):
    """Quantise rows of `lanes` 16-byte pieces; `flag` becomes 1 if a row has no 16-bit norm."""
    width = VECTORS[dtype].width
    pair, low_of, _ = HALVES[dtype]
    load, worst_of, placed = loader(dtype, threads), worst(width, lanes), placer(width, bits)
    squares_of, (sign, butterflies) = _squares(width, lanes), turns(lanes, dtype)
    shift, size, bounds = (lanes - 1).bit_length(), width * bits // 8, (1 << bits) - 1
    (store, _), whole = stores(size), float(f32(math.sqrt(width * lanes)))

    def body(x: u64, table: u64, norms: u64, codes: u64, flag: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, held = load(x, vectors, v)
        mine = i32(held & i32(lanes - 1))
        largest = worst_of(v)
        field = i32(min(max(i32(largest >> u32(23)), i32(1)), i32(254)))
        lift = power(i32(i32(254) - field))
        for i in range(width):
            v[i] = f32(v[i] * lift)
        total = squares_of(v)
        root, factor = f32(0), f32(0)
        if total > f32(0):
            root = root_of(total)
        norm = f32(root * power(field))
        if norm < f32(SMALLEST):
            norm = f32(0)
        else:
            factor = quotient(f32(whole), root, inverse_of(root))
        half = u32(pair(norm, f32(0)) & u32(0xFFFF))
        kept = low_of(half)
        if largest >= u32(INFINITE) or f32(kept - kept) != f32(0):
            ptx.st4(flag, u32(1))
        for i in range(width):
            v[i] = f32(v[i] * factor)
        sign(v, table + u64(u32(mine)) * u64(4 * width))
        butterflies(v, mine)
        found = ptx.local(width, u32)
        for i in range(width):
            found[i] = u32(0)
        for k in range(bounds):
            bound = ptx.ld_f32(table + u64(4 * (width * lanes + k)))
            for i in range(width):
                if v[i] > bound:
                    found[i] = u32(found[i] + u32(1))
        first, second = u32(0), u32(0)
        for i in range(width):
            first, second = placed(first, second, i, found[i])
        if inside:
            store(codes + u64(u32(at)) * u64(size), first, second)
            if mine == i32(0):
                ptx.st2(norms + u64(u32(at) >> u32(shift)) * u64(2), half)

    return body


@kernel(threads=256, table=TABLE)
def dequantise_turbo_rows(lanes, bits, dtype, threads):
    """Undo `quantise_turbo_rows`."""
    width, _, pack = VECTORS[dtype]
    _, low_of, _ = HALVES[dtype]
    (sign, butterflies), code = turns(lanes, dtype), code_at(width, bits)
    shift, size = (lanes - 1).bit_length(), width * bits // 8
    (_, load), whole = stores(size), float(f32(math.sqrt(width * lanes)))
    inverse = 1 / whole

    def body(norms: u64, codes: u64, table: u64, x: u64, vectors: i32):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        inside = at < vectors
        held = at if inside else i32(vectors - i32(1))  # every lane takes part in the shuffles
        mine = i32(held & i32(lanes - 1))
        first, second = load(codes + u64(u32(held)) * u64(size))
        norm = low_of(ptx.ld2(norms + u64(u32(held) >> u32(shift)) * u64(2)))
        v, levels = ptx.local(width, f32), table + u64(4 * width * lanes)
        for i in range(width):
            v[i] = ptx.ld_f32(levels + u64(code(first, second, i)) * u64(4))
        butterflies(v, mine)
        sign(v, table + u64(u32(mine)) * u64(4 * width))
        factor = quotient(norm, f32(whole), f32(inverse))
        for i in range(width):
            v[i] = f32(v[i] * factor)
        if inside:
            a, b, c, d = pack(v, 0)
            ptx.st16(x + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def serves(dtype: torch.dtype, width: int, bits: int) -> bool:
    """Say whether the kernels take such rows: a power of two of 16-byte pieces, a thread's codes whole bytes."""
    return lanes_of(dtype, width) > 0 and VECTORS[dtype].width * bits % 8 == 0


def quantise_launch(
    x: Tensor, table: Tensor, bits: int, norms: Tensor, codes: Tensor, flag: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors; `table`: signs, then bounds."""
    variant = quantise_turbo_rows(lanes=lanes_of(x.dtype, x.shape[-1]), bits=bits, dtype=x.dtype)
    return vector_launch(variant, x, (x, table, norms, codes, flag))


def dequantise_launch(norms: Tensor, codes: Tensor, table: Tensor, bits: int, x: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors; `table`: signs, then levels."""
    variant = dequantise_turbo_rows(lanes=lanes_of(x.dtype, x.shape[-1]), bits=bits, dtype=x.dtype)
    return vector_launch(variant, x, (norms, codes, table, x))
