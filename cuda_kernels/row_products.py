"""Products of queries with rows in CPU kernels, by vectors of sixteen: dot products, and weighted sums of rows.

Written as vectors: Numba hands an array to a function as seven numbers, which for rows this short costs more than the
products, and LLVM adds up the lanes of each dot product by themselves.
Rows are as many numbers long as make whole vectors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .halves import intrinsic

LANES = 16
WORD = ir.IntType(32)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _load_wide(builder: Any, address: Any, element: Any, wide: Any) -> Any:
    """Load a vector of numbers, as `widen` reads them."""

    def load(kind: Any) -> Any:
        return _load(builder, address, ir.VectorType(kind, LANES))

    if element == types.uint16:
        words = ir.VectorType(WORD, LANES)
        bits = builder.shl(builder.zext(load(ir.IntType(16)), words), words([16] * LANES))
        held = builder.bitcast(bits, ir.VectorType(ir.FloatType(), LANES))
    elif element == types.int16:
        held = builder.fpext(load(ir.HalfType()), ir.VectorType(ir.FloatType(), LANES))
    else:
        held = load(ir.DoubleType() if element == types.float64 else ir.FloatType())
    kind = ir.VectorType(wide, LANES)
    return held if held.type == kind else builder.fpext(held, kind)


def _moved(builder: Any, address: Any, index: Any, step: int) -> Any:
    """An address so many bytes on."""
    return builder.add(address, builder.mul(index, index.type(step)))


def _after(builder: Any, address: Any, step: Any, count: int) -> Any:
    """An address some steps on."""
    return builder.add(address, builder.mul(step, step.type(count)))


def _folded(builder: Any, a: Any, b: Any, groups: int) -> Any:
    """Of two vectors of `groups` parts to be added up, one of both, whose parts are half as long."""
    size = LANES // groups
    lower = [g * size + i for g in range(groups) for i in range(size // 2)]
    halves = []
    for shift in (0, size // 2):
        own = [place + shift for place in lower]
        which = ir.Constant(ir.VectorType(WORD, LANES), own + [LANES + place for place in own])
        halves.append(builder.shuffle_vector(a, b, which))
    return builder.fadd(*halves)


def _totals(builder: Any, sums: list[Any]) -> list[Any]:
    """Add up the lanes of 2, 4, 8 or 16 vectors, all together."""
    parts, groups = sums, 1
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts, groups = [_folded(builder, a, b, groups) for a, b in pairs], 2 * groups
    whole, size = parts[0], LANES // groups
    while size > 1:  # the lanes left of a part move to its first
        size //= 2
        near = [min(i + size, LANES - 1) for i in range(LANES)]
        which = ir.Constant(ir.VectorType(WORD, LANES), near)
        whole = builder.fadd(whole, builder.shuffle_vector(whole, whole, which))
    return [builder.extract_element(whole, WORD(i * (LANES // groups))) for i in range(len(sums))]


def _types(context: Any, like: Any) -> tuple[Any, int]:
    wide = context.get_value_type(like.dtype)
    return wide, 8 if wide == ir.DoubleType() else 4


def _dots(queries: int) -> Any:
    @intrinsic
    def dots(typingctx, to, to_step, q, q_step, a, b, width, like, row_like):
        """Write dot products with two rows, of elements of `row_like` at addresses; queries are of `like`.

        A query's two stand side by side; queries, and what is written of them, so many bytes apart.
        """

        def build(context, builder, signature, args):
            to, to_step, q, q_step, a, b, width, _, _ = args
            wide, size = _types(context, signature.args[7])
            kind, element = ir.VectorType(wide, LANES), signature.args[8].dtype
            each = element.bitwidth // 8
            totals = [cgutils.alloca_once_value(builder, kind(None)) for _ in range(2 * queries)]
            with cgutils.for_range(builder, builder.sdiv(width, width.type(LANES))) as loop:
                rows = [
                    _load_wide(
                        builder, _moved(builder, row, loop.index, each * LANES), element, wide
                    )
                    for row in (a, b)
                ]
                for i in range(queries):
                    place = _moved(builder, _after(builder, q, q_step, i), loop.index, size * LANES)
                    asked = _load(builder, place, kind)
                    for row, total in zip(rows, totals[2 * i : 2 * i + 2], strict=True):
                        product = builder.fmul(asked, row, flags=("contract",))
                        held = builder.load(total)
                        builder.store(builder.fadd(held, product, flags=("contract",)), total)
            for at, total in enumerate(_totals(builder, [builder.load(t) for t in totals])):
                place = _after(builder, to, to_step, at // 2)
                place = builder.add(place, place.type(at % 2 * size))
                builder.store(total, builder.inttoptr(place, wide.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(to, to_step, q, q_step, a, b, width, like, row_like), build

    return dots


def _sums(queries: int) -> Any:
    @intrinsic
    def sums(typingctx, to, to_step, weights, weights_step, a, b, c, d, width, like, row_like):
        """Add four rows, of elements of `row_like` at addresses, times weights to vectors of `like`.

        A query's four weights stand side by side; those of the next, and its vector, so many bytes on.
        """

        def build(context, builder, signature, args):
            to, to_step, weights, weights_step, *rows, width, _, _ = args
            wide, size = _types(context, signature.args[9])
            kind, element = ir.VectorType(wide, LANES), signature.args[10].dtype
            each = element.bitwidth // 8
            nothing, first = kind(ir.Undefined), ir.VectorType(WORD, LANES)(None)
            spread = []
            for i in range(4 * queries):
                place = _after(builder, weights, weights_step, i // 4)
                one = _load(builder, builder.add(place, place.type(i % 4 * size)), wide)
                one = builder.insert_element(nothing, one, WORD(0))
                spread.append(builder.shuffle_vector(one, nothing, first))
            with cgutils.for_range(builder, builder.sdiv(width, width.type(LANES))) as loop:
                held = [
                    _load_wide(
                        builder, _moved(builder, row, loop.index, each * LANES), element, wide
                    )
                    for row in rows
                ]
                for i in range(queries):
                    place = _after(builder, to, to_step, i)
                    place = _moved(builder, place, loop.index, size * LANES)
                    total = _load(builder, place, kind)
                    for weight, row in zip(spread[4 * i : 4 * i + 4], held, strict=True):
                        product = builder.fmul(weight, row, flags=("contract",))
                        total = builder.fadd(total, product, flags=("contract",))
                    builder.store(total, builder.inttoptr(place, kind.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(
            to, to_step, weights, weights_step, a, b, c, d, width, like, row_like
        ), build

    return sums


dots_of_four, dots_of_one = _dots(4), _dots(1)
sums_of_four, sums_of_one = _sums(4), _sums(1)
