"""Signs, and signs or nothing, times the mean size of a group of tokens, on a GPU: bit for bit `sign_groups.py`.

Two launches: mean sizes, a thread for 8 channels and all tokens of a group; then codes, a thread for 8 bytes of them,
for those of three levels lie five to a byte across tokens. The page is read twice. Decoding is a thread for 8 elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes_gpu import Launch
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .int_groups_gpu import HALVES

EIGHT, FOUR = 8, 4  # channels of a thread, the signs of a byte; words of their scales
TABLE = [
    {"three": three, "dtype": torch.bfloat16} for three in (False, True)
] + [{"three": True, "dtype": torch.float32}]  # fmt: skip


def _eight(dtype: torch.dtype) -> tuple[Any, Any]:
    """Give what loads and stores eight numbers: 16 bytes of a page, or 32."""
    width, unpack, pack = VECTORS[dtype]

    @device_function
    def load(at, v):
        for part in range(EIGHT // width):
            a, b, c, d = ptx.ld16(at + u64(16 * part))
            unpack(a, b, c, d, v, part * width)

    @device_function
    def store(at, v):
        for part in range(EIGHT // width):
            a, b, c, d = pack(v, part * width)
            ptx.st16(at + u64(16 * part), a, b, c, d)

    return load, store


def _scales_of(dtype: torch.dtype) -> Any:
    """Give what loads the scales of eight channels as float32."""
    _, low_of, high_of = HALVES[dtype]

    @device_function
    def load(at, scale):
        a, b, c, d = ptx.ld16(at)
        scale[0], scale[1], scale[2], scale[3] = low_of(a), high_of(a), low_of(b), high_of(b)
        scale[4], scale[5], scale[6], scale[7] = low_of(c), high_of(c), low_of(d), high_of(d)

    return load


@device_function
def _scales_place(scales, piece, per_row, inverse, inverse_shift, group_shift):
    """Where the scales of a piece of eight elements stand: of its channels, and its group of tokens."""
    row = i32(u64(u64(u32(piece)) * inverse) >> u64(u32(inverse_shift)))
    channels = i32(piece - i32(row * per_row))
    place = i32(i32(i32(row >> group_shift) * per_row) + channels)
    return scales + u64(u32(place)) * u64(2 * EIGHT)


@kernel(threads=128, table=[{"dtype": torch.bfloat16}, {"dtype": torch.float32}])
def mean_sizes(dtype, threads):
    """Find the scales of groups of `group` tokens; `flag` becomes 1 if one is not a number."""
    pair, low_of, high_of = HALVES[dtype]
    load, _ = _eight(dtype)
    size = EIGHT * dtype.itemsize

    def body(x: u64, scales: u64, flag: u64, group: i32, pieces: i32, inverse: f32):
        piece, g = i32(ptx.block() * i32(threads) + ptx.thread()), ptx.block_y()
        if piece >= pieces:
            return
        at = x + (u64(u32(g)) * u64(u32(group)) * u64(u32(pieces)) + u64(u32(piece))) * u64(size)
        total, v, t = ptx.local(EIGHT, f32), ptx.local(EIGHT, f32), i32(0)
        for i in range(EIGHT):
            total[i] = f32(0)
        while t < group:
            load(at, v)
            for i in range(EIGHT):
                total[i] = f32(total[i] + ptx.magnitude(v[i]))
            at, t = at + u64(u32(pieces)) * u64(size), i32(t + i32(1))
        words, odd = ptx.local(FOUR, u32), f32(0)
        for i in range(FOUR):
            words[i] = pair(f32(total[2 * i] * inverse), f32(total[2 * i + 1] * inverse))
            low, high = low_of(words[i]), high_of(words[i])
            odd += f32(f32(low - low) + f32(high - high))  # NaN if one is not finite
        if odd != f32(0):
            ptx.st4(flag, u32(1))
        place = scales + (u64(u32(g)) * u64(u32(pieces)) + u64(u32(piece))) * u64(2 * EIGHT)
        ptx.st16(place, words[0], words[1], words[2], words[3])

    return body


@kernel(threads=128, table=TABLE)
def code_signs(three, dtype, threads):
    """Code runs of 40 elements (three levels) or 64: eight bytes."""
    (load, _), scales_of = _eight(dtype), _scales_of(dtype)
    size, of_byte = EIGHT * dtype.itemsize, 5 if three else 8  # digits: as many pieces make a run
    of_run = EIGHT * of_byte

    @device_function
    def digits_of(v, scale, digits, at):
        for i in range(EIGHT):
            if three:
                large = ptx.magnitude(v[i]) > f32(scale[i] * f32(0.5))
                digit = u32(2) if v[i] > f32(0) else u32(0)
                digits[at + i] = digit if large else u32(1)
            else:
                digits[at + i] = u32(1) if v[i] >= f32(0) else u32(0)

    @device_function
    def byte_of(digits, at):
        """Five digits to the base of three, or eight bits; the first counts least."""
        byte = u32(0)
        for i in range(of_byte):
            if three:
                byte = u32(u32(byte * u32(3)) + digits[at + 4 - i])
            else:
                byte = u32(byte | (digits[at + i] << u32(i)))
        return byte

    def body(
        x: u64, scales: u64, codes: u64, pieces: i32, count: i32, per_row: i32,
        inverse: u64, inverse_shift: i32, group_shift: i32,
    ):  # fmt: skip
        run = i32(ptx.block() * i32(threads) + ptx.thread())
        if i32(run * i32(8)) >= count:
            return
        digits = ptx.local(of_run, u32)
        v, scale = ptx.local(EIGHT, f32), ptx.local(EIGHT, f32)
        for n in range(of_byte):
            piece = i32(run * i32(of_byte) + i32(n))
            if piece < pieces:
                load(x + u64(u32(piece)) * u64(size), v)
                scales_of(
                    _scales_place(scales, piece, per_row, inverse, inverse_shift, group_shift),
                    scale,
                )
                digits_of(v, scale, digits, EIGHT * n)
            else:
                for i in range(EIGHT):
                    digits[EIGHT * n + i] = u32(0)
        low, high = u32(0), u32(0)
        for i in range(4):
            low = u32(low | (byte_of(digits, of_byte * i) << u32(8 * i)))
            high = u32(high | (byte_of(digits, of_byte * (i + 4)) << u32(8 * i)))
        place = codes + u64(u32(run)) * u64(8)
        if i32(run * i32(8) + i32(8)) <= count:
            ptx.st8(place, low, high)
        else:
            for i in range(8):
                if i32(run * i32(8) + i32(i)) < count:
                    word = low if i < 4 else high
                    ptx.st1(place + u64(i), u32(u32(word >> u32(8 * (i & 3))) & u32(0xFF)))

    return body


@device_function
def third_of(byte):
    """A byte over three."""
    return u32(u32(byte * u32(171)) >> u32(9))


@kernel(threads=256, table=TABLE)
def widen_signs(three, dtype, threads):
    """Undo `code_signs`."""
    (_, store), scales_of = _eight(dtype), _scales_of(dtype)
    size = EIGHT * dtype.itemsize

    @device_function
    def digits_of(codes, piece, digits):
        if three:
            first = u32(u32(piece) * u32(EIGHT))
            at = u32(ptx.mul_high(first, u32(0xCCCCCCCD)) >> u32(2))  # over five
            before = i32(i32(first) - i32(i32(at) * i32(5)))  # digits of the piece before us
            byte = ptx.ld1(codes + u64(at))
            for i in range(4):
                byte = third_of(byte) if i32(i) < before else byte
            left = i32(i32(5) - before)
            for j in range(EIGHT):
                rest = third_of(byte)
                digits[j], byte = u32(byte - u32(rest * u32(3))), rest
                left = i32(left - i32(1))
                if j < EIGHT - 1 and left == i32(0):
                    at, left = u32(at + u32(1)), i32(5)
                    byte = ptx.ld1(codes + u64(at))
        else:
            byte = ptx.ld1(codes + u64(u32(piece)))
            for j in range(EIGHT):
                digits[j] = u32(u32(byte >> u32(j)) & u32(1))

    def body(
        scales: u64, codes: u64, x: u64, pieces: i32, per_row: i32, inverse: u64,
        inverse_shift: i32, group_shift: i32,
    ):  # fmt: skip
        piece = i32(ptx.block() * i32(threads) + ptx.thread())
        if piece >= pieces:
            return
        digits, scale = ptx.local(EIGHT, u32), ptx.local(EIGHT, f32)
        digits_of(codes, piece, digits)
        scales_of(_scales_place(scales, piece, per_row, inverse, inverse_shift, group_shift), scale)
        for j in range(EIGHT):
            step = i32(digits[j])
            step = i32(step - i32(1)) if three else i32(i32(step + step) - i32(1))
            scale[j] = f32(ptx.f32_of(step) * scale[j])
        store(x + u64(u32(piece)) * u64(size), scale)

    return body


def serves(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Say whether the kernels take such groups: of tokens a power of two, of channels whole eights.

    Another number of tokens divides a sum that a product with its inverse would not round as the CPU does.
    """
    groups, group, inner = shape
    elements = groups * group * inner
    return (
        dtype in VECTORS
        and group & (group - 1) == 0
        and inner % EIGHT == 0
        and 0 < groups < 1 << 16
        and 0 < elements < 1 << 31
    )


def _division(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """What finds a piece's row and group: pieces of a row, an inverse of it and its shift, the shift of a group.

    The product of a piece's number, below 2 ** 31, with the inverse is exact after the shift: the inverse is too large
    by less than one part in 2 ** 31.
    """
    _, group, inner = shape
    per_row = inner // EIGHT
    shift = 31 + (per_row - 1).bit_length()
    return per_row, -(-(1 << shift) // per_row), shift, group.bit_length() - 1


def sizes_launch(x: Tensor, scales: Tensor, flag: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    groups, group, inner = x.shape
    variant, pieces = mean_sizes(dtype=x.dtype), inner // EIGHT
    places = (t.data_ptr() for t in (x, scales, flag))
    grid = (-(-pieces // variant.threads), groups)
    return variant, grid, (*places, group, pieces, 1 / group)


def code_launch(x: Tensor, three: bool, scales: Tensor, codes: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant, pieces = code_signs(three=three, dtype=x.dtype), x.numel() // EIGHT
    places = (t.data_ptr() for t in (x, scales, codes))
    sizes = (pieces, codes.numel(), *_division(tuple(x.shape)))
    return variant, -(-codes.numel() // (8 * variant.threads)), (*places, *sizes)


def widen_launch(scales: Tensor, codes: Tensor, three: bool, x: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    variant, pieces = widen_signs(three=three, dtype=x.dtype), x.numel() // EIGHT
    places = (t.data_ptr() for t in (scales, codes, x))
    return variant, -(-pieces // variant.threads), (*places, pieces, *_division(tuple(x.shape)))
