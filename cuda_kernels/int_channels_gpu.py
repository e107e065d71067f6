"""Groups of a channel's tokens to codes of 2, 4 or 8 bits and back, on a GPU: KIVI's keys.

One thread for 16 bytes of channels and all tokens of a group, twice over them: the second time they are in a cache.
What it makes is what `int_groups.py` makes on the CPU, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes_gpu import Launch, code_at, inverse_of, placer, product, quotient, stores
from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .int_groups_gpu import BITS, HALVES, code_of, lifting

TABLE = [
    {"bits": bits, "dtype": torch.bfloat16} for bits in (2, 4)
] + [{"bits": 4, "dtype": torch.float32}]  # fmt: skip


@device_function
def _store_four(place, words):
    ptx.st16(place, words[0], words[1], words[2], words[3])


@device_function
def _store_two(place, words):
    ptx.st8(place, words[0], words[1])


@device_function
def _load_four(place, words):
    words[0], words[1], words[2], words[3] = ptx.ld16(place)


@device_function
def _load_two(place, words):
    words[0], words[1] = ptx.ld8(place)


@kernel(threads=128, table=TABLE)
def quantise_int_channels(bits, dtype, threads):
    """Quantise groups of `group` tokens; `flag` becomes 1 if a group cannot be coded."""
    width, unpack, _ = VECTORS[dtype]
    pair, low_of, high_of = HALVES[dtype]
    top, size, half = (1 << bits) - 1, width * bits // 8, width // 2
    placed, top_inverse = placer(width, bits), 1 / top
    (store, _), keep = stores(size), _store_four if width == 8 else _store_two

    def body(
        x: u64, codes: u64, scales: u64, lows: u64, flag: u64, group: i32, pieces: i32, groups: i32
    ):
        piece = i32(ptx.block() * i32(threads) + ptx.thread())
        g = ptx.block_y()
        if piece >= pieces or g >= groups:
            return
        token = u64(u32(g)) * u64(u32(group)) * u64(u32(pieces)) + u64(u32(piece))
        step, at, t = u64(u32(pieces)) * u64(16), x + token * u64(16), i32(0)
        low, high, v = ptx.local(width, f32), ptx.local(width, f32), ptx.local(width, f32)
        odd = f32(0)
        while t < group:
            a, b, c, d = ptx.ld16(at)
            unpack(a, b, c, d, v, 0)
            for i in range(width):
                odd += f32(v[i] - v[i])  # NaN if one is not finite
                if t == i32(0):
                    low[i], high[i] = v[i], v[i]
                else:
                    low[i], high[i] = ptx.smaller(low[i], v[i]), ptx.larger(high[i], v[i])
            at, t = at + step, i32(t + i32(1))
        lift, lifted, inverse = ptx.local(width, f32), ptx.local(width, f32), ptx.local(width, f32)
        first_half, second_half = ptx.local(half, u32), ptx.local(half, u32)
        for i in range(width):
            both = pair(quotient(f32(high[i] - low[i]), f32(top), f32(top_inverse)), low[i])
            scale = low_of(both)
            low[i] = high_of(both)
            odd += f32(f32(scale - scale) + f32(low[i] - low[i]))
            lift[i] = lifting(scale)
            lifted[i] = f32(scale * lift[i])
            inverse[i] = inverse_of(lifted[i])
            if i & 1 == 0:
                first_half[i >> 1], second_half[i >> 1] = (
                    u32(both & u32(0xFFFF)),
                    u32(both >> u32(16)),
                )
            else:
                first_half[i >> 1] = u32(first_half[i >> 1] | (both << u32(16)))
                second_half[i >> 1] = u32(second_half[i >> 1] | (both & u32(0xFFFF0000)))
        if odd != f32(0):
            ptx.st4(flag, u32(1))
        place = (u64(u32(g)) * u64(u32(pieces)) + u64(u32(piece))) * u64(2 * width)
        keep(scales + place, first_half)
        keep(lows + place, second_half)
        at, to, t = x + token * u64(16), codes + token * u64(size), i32(0)
        while t < group:
            a, b, c, d = ptx.ld16(at)
            unpack(a, b, c, d, v, 0)
            word, more = u32(0), u32(0)
            for i in range(width):
                code = u32(0)
                if lifted[i] > f32(0):
                    code = code_of(f32(v[i] - low[i]), lift[i], lifted[i], inverse[i], top)
                word, more = placed(word, more, i, code)
            store(to, word, more)
            at, to, t = at + step, to + u64(u32(pieces)) * u64(size), i32(t + i32(1))

    return body


@kernel(threads=128, table=TABLE)
def dequantise_int_channels(bits, dtype, threads):
    """Undo `quantise_int_channels`."""
    width, _, pack = VECTORS[dtype]
    _, low_of, high_of = HALVES[dtype]
    size, half = width * bits // 8, width // 2
    (_, load), code = stores(size), code_at(width, bits)
    fetch = _load_four if width == 8 else _load_two

    def body(codes: u64, scales: u64, lows: u64, x: u64, group: i32, pieces: i32, groups: i32):
        piece = i32(ptx.block() * i32(threads) + ptx.thread())
        g = ptx.block_y()
        if piece >= pieces or g >= groups:
            return
        scale, low, words = ptx.local(width, f32), ptx.local(width, f32), ptx.local(half, u32)
        place = (u64(u32(g)) * u64(u32(pieces)) + u64(u32(piece))) * u64(2 * width)
        fetch(scales + place, words)
        for j in range(half):
            scale[2 * j], scale[2 * j + 1] = low_of(words[j]), high_of(words[j])
        fetch(lows + place, words)
        for j in range(half):
            low[2 * j], low[2 * j + 1] = low_of(words[j]), high_of(words[j])
        token = u64(u32(g)) * u64(u32(group)) * u64(u32(pieces)) + u64(u32(piece))
        at, to, t = codes + token * u64(size), x + token * u64(16), i32(0)
        v = ptx.local(width, f32)
        while t < group:
            word, more = load(at)
            for i in range(width):
                v[i] = f32(product(ptx.f32_of(i32(code(word, more, i))), scale[i]) + low[i])
            a, b, c, d = pack(v, 0)
            ptx.st16(to, a, b, c, d)
            at, to = at + u64(u32(pieces)) * u64(size), to + u64(u32(pieces)) * u64(16)
            t = i32(t + i32(1))

    return body


def serves(dtype: torch.dtype, inner: int, bits: int, groups: int) -> bool:
    """Say whether the kernels take such pages: channels in whole 16-byte pieces, groups that a grid can number."""
    return (
        dtype in VECTORS and bits in BITS and inner * dtype.itemsize % 16 == 0 and groups < 1 << 16
    )


def _shape(x: Tensor, group: int, variant: Variant) -> tuple[tuple[int, int], tuple[int, int, int]]:
    pieces = x.shape[-1] * x.element_size() // 16
    groups = x.numel() // (group * x.shape[-1])
    return (-(-pieces // variant.threads), groups), (group, pieces, groups)


def quantise_launch(
    x: Tensor, bits: int, group: int, codes: Tensor, scales: Tensor, lows: Tensor, flag: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = quantise_int_channels(bits=bits, dtype=x.dtype)
    grid, sizes = _shape(x, group, variant)
    return variant, grid, (*(t.data_ptr() for t in (x, codes, scales, lows, flag)), *sizes)


def dequantise_launch(
    codes: Tensor, scales: Tensor, lows: Tensor, bits: int, group: int, x: Tensor
) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant = dequantise_int_channels(bits=bits, dtype=x.dtype)
    grid, sizes = _shape(x, group, variant)
    return variant, grid, (*(t.data_ptr() for t in (codes, scales, lows, x)), *sizes)
