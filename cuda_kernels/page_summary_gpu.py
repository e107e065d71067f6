"""Summaries of pages on a GPU: a thread has 16 bytes of a unit's channels and goes through its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS

AT_ONCE = 4  # tokens that a thread has in flight
INF = float("inf")
MOST_BLOCKS = 65535  # of a grid's y


@device_function
def _less(value, least):
    """The lesser; a NaN wins, and then stays."""
    return value if value < least or value != value else least


@device_function
def _more(value, most):
    return value if value > most or value != value else most


@kernel(
    threads=128,
    table=[
        {"dtype": torch.bfloat16, "page_tokens": 16, "ranges": True},
        {"dtype": torch.bfloat16, "page_tokens": 16, "ranges": False},
        {"dtype": torch.float32, "page_tokens": 64, "ranges": True},
    ],
)
def summarise_units(dtype, page_tokens, ranges, threads):
    """Block (u, y) adds tokens `[first, stop)` to unit `first_unit + u`; `low` and `high`, or the sum in `low`."""
    width, unpack, pack = VECTORS[dtype]
    load_sums, store_sums = _sums(width)
    bits, inside = (page_tokens - 1).bit_length(), page_tokens - 1
    loaded = 4 * AT_ONCE

    def body(
        keys: u64, pages: u64, low: u64, high: u64, first: i32, stop: i32, first_unit: i32,
        unit: i32, shift: i32, pieces: i32,
    ):  # fmt: skip
        piece = i32(ptx.block_y() * i32(threads) + ptx.thread())
        if piece >= pieces:
            return
        u = i32(first_unit + ptx.block())
        begin = i32(u * unit - shift)
        end = min(stop, i32(begin + unit))
        fresh = begin >= first
        t = begin if fresh else first
        row_bytes, offset = u64(u32(pieces)) * u64(16), u64(u32(piece)) * u64(16)
        at = u64(u32(u)) * u64(u32(pieces)) + u64(u32(piece))
        lows, highs, x = ptx.local(width, f32), ptx.local(width, f32), ptx.local(width, f32)
        for i in range(width):
            lows[i] = f32(INF) if ranges else f32(0)
            highs[i] = f32(-INF)
        if not fresh:
            if ranges:
                a, b, c, d = ptx.ld16(low + at * u64(16))
                unpack(a, b, c, d, lows, 0)
                a, b, c, d = ptx.ld16(high + at * u64(16))
                unpack(a, b, c, d, highs, 0)
            else:
                load_sums(low + at * u64(4 * width), lows)
        v = ptx.local(loaded, u32)
        while t < end:
            for j in range(AT_ONCE):  # all loads first; beyond the end the first token again
                token = i32(t + i32(j)) if i32(t + i32(j)) < end else t
                page = ptx.ld4(pages + u64(u32(token >> i32(bits))) * u64(4))
                row = u64(page) * u64(page_tokens) + u64(u32(token & i32(inside)))
                v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3] = ptx.ld16_once(
                    keys + row * row_bytes + offset
                )
            for j in range(AT_ONCE):
                unpack(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3], x, 0)
                for i in range(width):
                    if ranges:
                        lows[i], highs[i] = _less(x[i], lows[i]), _more(x[i], highs[i])
                    elif i32(t + i32(j)) < end:
                        lows[i] += x[i]
            t = i32(t + i32(AT_ONCE))
        if ranges:
            a, b, c, d = pack(lows, 0)
            ptx.st16(low + at * u64(16), a, b, c, d)
            a, b, c, d = pack(highs, 0)
            ptx.st16(high + at * u64(16), a, b, c, d)
        else:
            store_sums(low + at * u64(4 * width), lows)

    return body


def _sums(width: int) -> tuple[Any, Any]:
    """What loads and stores `width` float32."""

    @device_function
    def load(at, x):
        for i in range(0, width, 4):
            a, b, c, d = ptx.ld16(at + u64(4 * i))
            x[i], x[i + 1], x[i + 2] = ptx.as_f32(a), ptx.as_f32(b), ptx.as_f32(c)
            x[i + 3] = ptx.as_f32(d)

    @device_function
    def store(at, x):
        for i in range(0, width, 4):
            ptx.st16(
                at + u64(4 * i),
                ptx.as_u32(x[i]), ptx.as_u32(x[i + 1]), ptx.as_u32(x[i + 2]), ptx.as_u32(x[i + 3]),
            )  # fmt: skip

    return load, store


def serves(keys: Tensor, low: Tensor, high: Tensor | None) -> bool:
    """Say whether the kernel takes them: contiguous keys in a dtype of `VECTORS`, tokens of whole 16-byte pieces."""
    page_tokens, row_bytes = keys.shape[1], keys[0, 0].numel() * keys.element_size()
    pieces = all(t.data_ptr() % 16 == 0 for t in (keys, low, *(() if high is None else (high,))))
    whole = row_bytes % 16 == 0 and row_bytes <= 128 * 16 * MOST_BLOCKS
    power = page_tokens & (page_tokens - 1) == 0
    return keys.dtype in VECTORS and keys.is_contiguous() and pieces and whole and power


def summarise_launch(
    keys: Tensor, pages: Tensor, first: int, stop: int, unit: int, shift: int, low: Tensor,
    high: Tensor | None,
) -> tuple[Variant, tuple[int, int], tuple[int, ...]]:  # fmt: skip
    """Choose the variant, the grid and the arguments; pages int32, `first < stop`."""
    pieces = keys[0, 0].numel() * keys.element_size() // 16
    first_unit, last = (first + shift) // unit, (stop - 1 + shift) // unit
    variant = summarise_units(dtype=keys.dtype, page_tokens=keys.shape[1], ranges=high is not None)
    pointers = (t.data_ptr() for t in (keys, pages, low, low if high is None else high))
    numbers = first, stop, first_unit, unit, shift, pieces
    grid = last - first_unit + 1, -(-pieces // variant.threads)
    return variant, grid, (*pointers, *numbers)
