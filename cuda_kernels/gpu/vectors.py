"""Sixteen bytes of a tensor as float32 numbers in registers, whatever its dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import ptx
from .ptx import device_function


class Vector(NamedTuple):
    """How kernels see one dtype.

    Attributes:
        width: how many numbers 16 bytes hold.
        unpack: `unpack(a, b, c, d, out, at)` writes them to `out[at : at + width]`.
        pack: `pack(x, at)` gives the four words of `x[at : at + width]`, rounded to nearest even.
    """

    width: int
    unpack: Callable[..., Any]
    pack: Callable[..., Any]


@device_function
def _unpack_bf16(a, b, c, d, out, at):
    out[at], out[at + 1] = ptx.bf16_low(a), ptx.bf16_high(a)
    out[at + 2], out[at + 3] = ptx.bf16_low(b), ptx.bf16_high(b)
    out[at + 4], out[at + 5] = ptx.bf16_low(c), ptx.bf16_high(c)
    out[at + 6], out[at + 7] = ptx.bf16_low(d), ptx.bf16_high(d)


@device_function
def _pack_bf16(x, at):
    return (
        ptx.bf16x2(x[at], x[at + 1]),
        ptx.bf16x2(x[at + 2], x[at + 3]),
        ptx.bf16x2(x[at + 4], x[at + 5]),
        ptx.bf16x2(x[at + 6], x[at + 7]),
    )


@device_function
def _unpack_f16(a, b, c, d, out, at):
    out[at], out[at + 1] = ptx.f16_low(a), ptx.f16_high(a)
    out[at + 2], out[at + 3] = ptx.f16_low(b), ptx.f16_high(b)
    out[at + 4], out[at + 5] = ptx.f16_low(c), ptx.f16_high(c)
    out[at + 6], out[at + 7] = ptx.f16_low(d), ptx.f16_high(d)


@device_function
def _pack_f16(x, at):
    return (
        ptx.f16x2(x[at], x[at + 1]),
        ptx.f16x2(x[at + 2], x[at + 3]),
        ptx.f16x2(x[at + 4], x[at + 5]),
        ptx.f16x2(x[at + 6], x[at + 7]),
    )


@device_function
def _unpack_f32(a, b, c, d, out, at):
    out[at], out[at + 1] = ptx.as_f32(a), ptx.as_f32(b)
    out[at + 2], out[at + 3] = ptx.as_f32(c), ptx.as_f32(d)


@device_function
def _pack_f32(x, at):
    return (
        ptx.as_u32(x[at]),
        ptx.as_u32(x[at + 1]),
        ptx.as_u32(x[at + 2]),
        ptx.as_u32(x[at + 3]),
    )


VECTORS = {
    torch.bfloat16: Vector(8, _unpack_bf16, _pack_bf16),
    torch.float16: Vector(8, _unpack_f16, _pack_f16),
    torch.float32: Vector(4, _unpack_f32, _pack_f32),
}
