"""16-bit floats in CPU kernels: Numba has no type for them, so kernels read bfloat16 as uint16 and float16 as int16."""

from __future__ import annotations

from typing import Any

from numba import types

from .vectors import floats, intrinsic, ints, rounded, widened

HALVES = (types.uint16, types.int16)


@intrinsic
def widen(typingctx, x):
    """Turn a 16-bit float into float32; leave any other number."""
    x = types.unliteral(x)

    def build(context, builder, signature, args):
        if x == types.uint16:
            return widened(builder, args[0])
        if x == types.int16:
            return builder.fpext(builder.bitcast(args[0], floats(16)), floats(32))
        return args[0]

    return (types.float32 if x in HALVES else x)(x), build


@intrinsic
def narrow(typingctx, x, like):
    """Turn what `widen` and arithmetic made into an element of the array `like`; 16-bit floats round to even."""
    return _narrow(x, like, True)


@intrinsic
def narrow_result(typingctx, x, like):
    """Do what `narrow` does, faster, for numbers and for the NaN that arithmetic makes (its last bits are zeros)."""
    return _narrow(x, like, False)


def _narrow(x: Any, like: Any, any_nan: bool) -> Any:
    x = types.unliteral(x)
    to = like.dtype
    wide = types.float32 if to in HALVES else to

    def build(context, builder, signature, args):
        value = context.cast(builder, args[0], x, wide)
        if to == types.int16:
            return builder.bitcast(builder.fptrunc(value, floats(16)), ints(16))
        if to == types.uint16:
            return _to_bfloat16(builder, value, any_nan)
        return value

    return to(x, like), build


def _to_bfloat16(builder: Any, value: Any, any_nan: bool) -> Any:
    word = ints(32)
    nearest = builder.lshr(rounded(builder, value), word(16))
    if any_nan:
        quiet = builder.or_(builder.lshr(builder.bitcast(value, word), word(16)), word(0x40))
        nearest = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
    return builder.trunc(nearest, ints(16))
