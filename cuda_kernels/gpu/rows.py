"""What a block does with one row of a fused norm: device functions for one width and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import ptx
from .ptx import device_function, f32, i32, u32, u64
from .vectors import VECTORS


class Row(NamedTuple):
    """What a thread does with its pieces of a row; made for one width and dtype."""

    numbers: int
    add: Callable[..., Any]
    add_all: Callable[..., Any]
    round_and_store: Callable[..., Any]
    fetch: Callable[..., Any]
    copy_row: Callable[..., Any]
    send: Callable[..., Any]
    add_in_switch: Callable[..., Any]
    spread: Callable[..., Any]
    statistics: Callable[..., Any]
    finish: Callable[..., Any]


def row_functions(
    world: int, hidden: int, dtype: torch.dtype, layer_norm: bool, fp8: bool, threads: int
) -> Row:
    """Make the device functions for rows of `hidden` numbers; thread t holds the pieces t, t + threads, ...."""
    width, unpack, pack = VECTORS[dtype]
    pieces = hidden // width
    each = -(-pieces // threads)
    part, per_row, gathered = f32(1.0 / hidden), hidden * dtype.itemsize, 4 * world

    @device_function
    def fetch(row_at, x):
        """Load a row."""
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                a, b, c, d = ptx.ld16(row_at + u64(u32(piece)) * u64(16))
                unpack(a, b, c, d, x, v * width)

    @device_function
    def add(row_at, x):
        """Add a row."""
        more = ptx.local(width, f32)
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                a, b, c, d = ptx.ld16(row_at + u64(u32(piece)) * u64(16))
                unpack(a, b, c, d, more, 0)
                for i in range(width):
                    x[v * width + i] += more[i]

    @device_function
    def add_all(first_at, apart, x):
        """Add the same row of `world` places, `apart` bytes from each other, in order; all loads of a piece at once."""
        words, more = ptx.local(gathered, u32), ptx.local(width, f32)
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                at = first_at + u64(u32(piece)) * u64(16)
                for r in range(world):
                    a, b, c, d = ptx.ld16(at + u64(r) * apart)
                    words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3] = a, b, c, d
                for r in range(world):
                    unpack(
                        words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3], more, 0
                    )
                    for i in range(width):
                        x[v * width + i] += more[i]

    @device_function
    def round_and_store(row_at, x):
        """Round a row to the dtype, and write it."""
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                a, b, c, d = pack(x, v * width)
                ptx.st16(row_at + u64(u32(piece)) * u64(16), a, b, c, d)
                unpack(a, b, c, d, x, v * width)

    @device_function
    def copy_row(source, to):
        """Copy a row that nobody writes meanwhile."""
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                at = u64(u32(piece)) * u64(16)
                a, b, c, d = ptx.ld16_once(source + at)
                ptx.st16(to + at, a, b, c, d)

    @device_function
    def send(row_at, x):
        """Write a row of numbers that are rounded already."""
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                a, b, c, d = pack(x, v * width)
                ptx.st16(row_at + u64(u32(piece)) * u64(16), a, b, c, d)

    @device_function
    def add_in_switch(row_at, x):
        """Fetch the sum over ranks of a row at a multicast address."""
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                a, b, c, d = ptx.multimem_ld16_add_bf16(row_at + u64(u32(piece)) * u64(16))
                unpack(a, b, c, d, x, v * width)

    @device_function
    def spread(row_at, x):
        """Write a row of rounded numbers at a multicast address."""
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                a, b, c, d = pack(x, v * width)
                ptx.multimem_st16(row_at + u64(u32(piece)) * u64(16), a, b, c, d)

    @device_function
    def statistics(x, eps):
        """Mean (0 for RMSNorm) and reciprocal deviation of a row that lies in the block's registers."""
        mean = f32(0)
        if layer_norm:
            for i in range(each * width):
                mean += x[i]
            mean = f32(ptx.block_sum(mean) * part)
        squares = f32(0)
        for v in range(each):
            if i32(ptx.thread() + i32(v * threads)) < i32(pieces):
                for i in range(width):
                    apart = f32(x[v * width + i] - mean)
                    squares += f32(apart * apart)
        return mean, ptx.rsqrt(f32(ptx.block_sum(squares) * part + eps))

    @device_function
    def finish(x, mean, scale, weight, bias, normed, scales, row):
        """Normalise a row and write it, quantised if asked."""
        w, b = ptx.local(width, f32), ptx.local(width, f32)
        largest = f32(0)
        for v in range(each):
            piece = i32(ptx.thread() + i32(v * threads))
            if piece < i32(pieces):
                at = u64(u32(piece)) * u64(16)
                p, q, r, s = ptx.ld16_once(weight + at)
                unpack(p, q, r, s, w, 0)
                for i in range(width):
                    x[v * width + i] = f32(f32(x[v * width + i] - mean) * scale)
                if layer_norm:
                    p, q, r, s = ptx.ld16_once(bias + at)
                    unpack(p, q, r, s, b, 0)
                    for i in range(width):
                        x[v * width + i] = f32(x[v * width + i] * w[i] + b[i])
                else:  # rounded before the weight, as transformers does
                    p, q, r, s = pack(x, v * width)
                    unpack(p, q, r, s, x, v * width)
                    for i in range(width):
                        x[v * width + i] *= w[i]
                p, q, r, s = pack(x, v * width)
                if not fp8:
                    ptx.st16(normed + u64(u32(row)) * u64(per_row) + at, p, q, r, s)
                unpack(p, q, r, s, x, v * width)
                for i in range(width):
                    largest = ptx.larger(largest, ptx.magnitude(x[v * width + i]))
        if fp8:
            largest = ptx.block_max(largest)
            step = f32(1) if largest == f32(0) else f32(largest * f32(1 / 448))
            if ptx.thread() == i32(0):
                ptx.st_f32(scales + u64(u32(row)) * u64(4), step)
            by = ptx.reciprocal(step)
            for v in range(each):
                piece = i32(ptx.thread() + i32(v * threads))
                if piece < i32(pieces):
                    place = u64(u32(row)) * u64(hidden) + u64(u32(piece)) * u64(width)
                    for i in range(0, width, 4):
                        j = v * width + i
                        low = ptx.e4m3x2(f32(x[j] * by), f32(x[j + 1] * by))
                        high = ptx.e4m3x2(f32(x[j + 2] * by), f32(x[j + 3] * by))
                        ptx.st4(normed + place + u64(i), ptx.pick_bytes(low, high, u32(0x5410)))

    return Row(
        each * width, add, add_all, round_and_store, fetch, copy_row, send, add_in_switch, spread, statistics, finish
    )  # fmt: skip
