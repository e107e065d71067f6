"""Random Hadamard rotation of rows on a GPU: what `hadamard.py` makes on the CPU, bit for bit.

One thread for 16 bytes of a row: the first butterflies are its own, the others are shuffles. Widths are powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .codes_gpu import Launch, lanes_of, loader, product, vector_launch
from .gpu import ptx
from .gpu.kernel import kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS

TABLE = [
    {"lanes": 16, "inverse": inverse, "dtype": torch.bfloat16} for inverse in (False, True)
] + [{"lanes": 32, "inverse": False, "dtype": torch.float32}]  # fmt: skip


def turns(lanes: int, dtype: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Give what multiplies numbers by their signs over the root of the width, and what adds and subtracts a row's."""
    width = VECTORS[dtype].width
    own, shift, fours = width.bit_length() - 1, (lanes - 1).bit_length(), width // 4
    factor = float(f32(1 / math.sqrt(width * lanes)))

    @device_function
    def sign(v, signs):
        for k in range(fours):
            a, b, c, d = ptx.ld16(signs + u64(16 * k))
            i = 4 * k
            v[i] = product(v[i], f32(ptx.as_f32(a) * f32(factor)))
            v[i + 1] = product(v[i + 1], f32(ptx.as_f32(b) * f32(factor)))
            v[i + 2] = product(v[i + 2], f32(ptx.as_f32(c) * f32(factor)))
            v[i + 3] = product(v[i + 3], f32(ptx.as_f32(d) * f32(factor)))

    @device_function
    def butterflies(v, mine):
        for level in range(own):
            for i in range(width):
                if (i >> level) & 1 == 0:
                    j = i + (1 << level)
                    v[i], v[j] = f32(v[i] + v[j]), f32(v[i] - v[j])
        for step in range(shift):
            for i in range(width):
                other = ptx.shuffle_xor(v[i], i32(1 << step))
                if i32(i32(mine >> i32(step)) & i32(1)) == i32(1):
                    v[i] = f32(other - v[i])
                else:
                    v[i] = f32(v[i] + other)

    return sign, butterflies


@kernel(threads=256, table=TABLE)
def rotate_rows(lanes, inverse, dtype, threads):
    """Rotate rows of `lanes` 16-byte pieces; `signs` are float32, +-1."""
    width, _, pack = VECTORS[dtype]
    load, (sign, butterflies) = loader(dtype, threads), turns(lanes, dtype)

    def body(x: u64, signs: u64, out: u64, vectors: i32):
        v = ptx.local(width, f32)
        at, inside, held = load(x, vectors, v)
        mine = i32(held & i32(lanes - 1))
        place = signs + u64(u32(mine)) * u64(4 * width)
        if not inverse:
            sign(v, place)
        butterflies(v, mine)
        if inverse:
            sign(v, place)
        if inside:
            a, b, c, d = pack(v, 0)
            ptx.st16(out + u64(u32(at)) * u64(16), a, b, c, d)

    return body


def serves(dtype: torch.dtype, width: int) -> bool:
    """Say whether the kernel takes such rows: a power of two of 16-byte pieces, to 32."""
    return lanes_of(dtype, width) > 0


def rotate_launch(x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> Launch:
    """Choose the variant, the grid and the arguments for contiguous tensors."""
    lanes = lanes_of(x.dtype, x.shape[-1])
    return vector_launch(
        rotate_rows(lanes=lanes, inverse=inverse, dtype=x.dtype), x, (x, signs, out)
    )
