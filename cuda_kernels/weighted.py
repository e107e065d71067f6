"""Weighted sums of runs of numbers in CPU kernels, by vectors of eight.

Written as vectors: from a loop over several arrays LLVM makes a check, at each of these short runs, that none overlaps.
Numba caches a kernel by the text of its own file: one that calls these ends with the hash of this file.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .halves import intrinsic

EIGHT = 8


def _eight(builder: Any, address: Any, element: Any, wide: Any) -> Any:
    """Load eight numbers, as `widen` reads them."""

    def load(kind: Any) -> Any:
        pointer = builder.inttoptr(address, ir.VectorType(kind, EIGHT).as_pointer())
        return builder.load(pointer, align=1)

    if element == types.uint16:
        words = ir.VectorType(ir.IntType(32), EIGHT)
        bits = builder.shl(builder.zext(load(ir.IntType(16)), words), words([16] * EIGHT))
        held = builder.bitcast(bits, ir.VectorType(ir.FloatType(), EIGHT))
        held_type = ir.FloatType()
    elif element == types.int16:
        held = builder.fpext(load(ir.HalfType()), ir.VectorType(ir.FloatType(), EIGHT))
        held_type = ir.FloatType()
    else:
        held_type = wide
        held = load(wide)
    return held if held_type == wide else builder.fpext(held, ir.VectorType(wide, EIGHT))


def _sum(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """to[:8] = add * to[:8] + sum of weight * of[:8]; args are to, add, like, then address and weight in turn."""
    wide = context.get_value_type(signature.args[4])
    vector = ir.VectorType(wide, EIGHT)
    place = builder.inttoptr(args[0], vector.as_pointer())
    nothing = vector([0.0] * EIGHT)
    total = builder.select(args[1], builder.load(place, align=1), nothing)
    for address, weight in zip(args[3::2], args[4::2], strict=True):
        spread = vector(ir.Undefined)
        for i in range(EIGHT):
            spread = builder.insert_element(spread, weight, ir.IntType(32)(i))
        product = builder.fmul(
            spread, _eight(builder, address, signature.args[2].dtype, wide), flags=("contract",)
        )
        total = builder.fadd(total, product, flags=("contract",))
    builder.store(total, place, align=1)
    return context.get_dummy_value()


@intrinsic
def weighted1(typingctx, to, add, like, a, wa):
    """Eight numbers at address `to`: wa * a, plus what stands there if `add`; addresses of elements of `like`."""
    return types.void(to, add, like, a, wa), _sum


@intrinsic
def weighted2(typingctx, to, add, like, a, wa, b, wb):
    """The same for two runs."""
    return types.void(to, add, like, a, wa, b, wb), _sum


@intrinsic
def weighted4(typingctx, to, add, like, a, wa, b, wb, c, wc, d, wd):
    """The same for four runs."""
    return types.void(to, add, like, a, wa, b, wb, c, wc, d, wd), _sum


# inlines halves.py 3d74d947
