"""Conversions and arithmetic on 32-bit registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .words import f32, i32, u32, word


@word("mov.b32 $0, $1;", "f32", "u32", pure=True)
def as_f32(bits: Any) -> Any:
    return u32(bits).view(f32)


@word("mov.b32 $0, $1;", "u32", "f32", pure=True)
def as_u32(value: Any) -> Any:
    return f32(value).view(u32)


@word("{.reg .b32 t; shl.b32 t, $1, 16; mov.b32 $0, t;}", "f32", "u32", pure=True)
def bf16_low(pair: Any) -> Any:
    """The bfloat16 in the low half, exactly."""
    return u32((int(pair) << 16) & 0xFFFFFFFF).view(f32)


@word("{.reg .b32 t; and.b32 t, $1, 0xffff0000; mov.b32 $0, t;}", "f32", "u32", pure=True)
def bf16_high(pair: Any) -> Any:
    return u32(int(pair) & 0xFFFF0000).view(f32)


def _bf16_bits(value: Any) -> int:
    bits = int(f32(value).view(u32))
    if value != value:
        return 0x7FFF  # what cvt gives
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@word("cvt.rn.bf16x2.f32 $0, $2, $1;", "u32", "f32 f32", pure=True)
def bf16x2(low: Any, high: Any) -> Any:
    """Round two numbers to bfloat16, to nearest even."""
    return u32(_bf16_bits(low) | _bf16_bits(high) << 16)


@word("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;}", "f32", "u32", pure=True)
def f16_low(pair: Any) -> Any:
    return f32(np.uint16(int(pair) & 0xFFFF).view(np.float16))


@word("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h;}", "f32", "u32", pure=True)
def f16_high(pair: Any) -> Any:
    return f32(np.uint16(int(pair) >> 16).view(np.float16))


@word("cvt.rn.f16x2.f32 $0, $2, $1;", "u32", "f32 f32", pure=True)
def f16x2(low: Any, high: Any) -> Any:
    """Round two numbers to float16, to nearest even."""
    pair = np.array([low, high], f32).astype(np.float16).view(np.uint16)
    return u32(int(pair[0]) | int(pair[1]) << 16)


def _e4m3_bits(value: Any) -> int:
    x = float(value)
    if x != x:
        return 0x7F
    sign, x = (0x80 if np.signbit(f32(value)) else 0), min(abs(x), 448.0)
    if x < 2**-6:
        return sign | round(x * 512)  # round() ties to even, as rn does
    exponent = int(np.floor(np.log2(x)))
    steps = round(x / 2.0 ** (exponent - 3))  # 8 .. 16
    return sign | min(((exponent + 7) << 3) + steps - 8, 0x7E)


@word(
    "{.reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, $2, $1; cvt.u32.u16 $0, t;}",
    "u32",
    "f32 f32",
    pure=True,
)
def e4m3x2(low: Any, high: Any) -> Any:
    """Round two numbers to float8_e4m3fn in the low two bytes; saturating, NaN to 0x7F. sm_89 and up."""
    return u32(_e4m3_bits(low) | _e4m3_bits(high) << 8)


@word("{.reg .b16 t; cvt.u16.u32 t, $1; cvt.rn.f16x2.e4m3x2 $0, t;}", "u32", "u32", pure=True)
def f16x2_of_e4m3x2(pair: Any) -> Any:
    """Widen the two float8_e4m3fn in the low two bytes to float16, exactly. sm_89 and up."""
    import torch

    raw = torch.tensor([int(pair) & 0xFF, int(pair) >> 8 & 0xFF], dtype=torch.uint8)
    halves = raw.view(torch.float8_e4m3fn).to(torch.float16).view(torch.uint16)
    return u32(int(halves[0]) | int(halves[1]) << 16)


@word("cvt.rni.s32.f32 $0, $1;", "i32", "f32", pure=True)
def nearest(value: Any) -> Any:
    """Round to the nearest integer, ties to even, clamped to int32; NaN gives 0."""
    x = float(value)
    return i32(0) if x != x else i32(min(max(np.rint(x), -(2.0**31)), 2.0**31 - 1))


@word("cvt.rn.f32.s32 $0, $1;", "f32", "i32", pure=True)
def f32_of(value: Any) -> Any:
    return f32(int(value))


@word("prmt.b32 $0, $1, $2, $3;", "u32", "u32 u32 u32", pure=True)
def pick_bytes(a: Any, b: Any, selector: Any) -> Any:
    """Byte i of the result is byte (nibble i of `selector`) of the eight bytes a, b (prmt)."""
    source = (int(b) << 32 | int(a)).to_bytes(8, "little")
    chosen = bytes(source[int(selector) >> 4 * i & 7] for i in range(4))
    return u32(int.from_bytes(chosen, "little"))


@word("popc.b32 $0, $1;", "i32", "u32", pure=True)
def ones(bits: Any) -> Any:
    """Count the bits that are set."""
    return i32(int(bits).bit_count())


@word("clz.b32 $0, $1;", "i32", "u32", pure=True)
def leading_zeros(bits: Any) -> Any:
    return i32(32 - int(bits).bit_length())


@word("mul.hi.u32 $0, $1, $2;", "u32", "u32 u32", pure=True)
def mul_high(a: Any, b: Any) -> Any:
    """The upper half of a product: what a division by a constant is made of."""
    return u32(int(a) * int(b) >> 32)


@word("max.f32 $0, $1, $2;", "f32", "f32 f32", pure=True)
def larger(a: Any, b: Any) -> Any:
    """The larger; a NaN loses against a number."""
    return np.fmax(f32(a), f32(b))


@word("min.f32 $0, $1, $2;", "f32", "f32 f32", pure=True)
def smaller(a: Any, b: Any) -> Any:
    return np.fmin(f32(a), f32(b))


@word("abs.f32 $0, $1;", "f32", "f32", pure=True)
def magnitude(a: Any) -> Any:
    return abs(f32(a))


@word("ex2.approx.ftz.f32 $0, $1;", "f32", "f32", pure=True)
def exp2(x: Any) -> Any:
    return np.exp2(f32(x))


@word("lg2.approx.ftz.f32 $0, $1;", "f32", "f32", pure=True)
def log2(x: Any) -> Any:
    return np.log2(f32(x))


@word("rcp.approx.ftz.f32 $0, $1;", "f32", "f32", pure=True)
def reciprocal(x: Any) -> Any:
    return f32(1) / f32(x)


@word("rsqrt.approx.ftz.f32 $0, $1;", "f32", "f32", pure=True)
def rsqrt(x: Any) -> Any:
    return f32(1) / np.sqrt(f32(x))


@word("div.rn.f32 $0, $1, $2;", "f32", "f32 f32", pure=True)
def divide(a: Any, b: Any) -> Any:
    """Divide as IEEE says: where a code must be bit for bit what the CPU makes."""
    return f32(a) / f32(b)


@word("fma.rn.f32 $0, $1, $2, $3;", "f32", "f32 f32 f32", pure=True)
def multiply_add(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return f32(float(a) * float(b) + float(c))


@word("tanh.approx.f32 $0, $1;", "f32", "f32", pure=True)
def tanh(x: Any) -> Any:
    return np.tanh(f32(x))


@word("fma.rn.bf16x2 $0, $1, $2, $3;", "u32", "u32 u32 u32", pure=True)
def multiply_add_bf16x2(a: Any, b: Any, c: Any) -> Any:
    """a * b + c for two bfloat16 each, rounded once; subnormal numbers count."""
    low, high = (
        f32(float(half(a)) * float(half(b)) + float(half(c))) for half in (bf16_low, bf16_high)
    )
    return bf16x2(low, high)
