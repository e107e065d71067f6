"""Products of queries with rows in CPU kernels, by vectors of sixteen: dot products, and weighted sums of rows.

Written as vectors: Numba hands an array to a function as seven numbers, which for rows this short costs more than the
products, and LLVM adds up the lanes of each dot product by themselves.
Rows are as many numbers long as make whole vectors.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from .vectors import floats, intrinsic, ints, load, load_wide, moved, shuffled, spread, store

LANES = 16


def _row(builder: Any, address: Any, element: Any, kind: Any) -> Any:
    """Load part of a row."""
    held = load_wide(builder, address, element, LANES)
    return held if held.type == kind else builder.fpext(held, kind)


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
        halves.append(shuffled(builder, own + [LANES + place for place in own], a, b))
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
        whole = builder.fadd(whole, shuffled(builder, near, whole))
    return [
        builder.extract_element(whole, ints(32)(i * (LANES // groups))) for i in range(len(sums))
    ]


def _dots(queries: int) -> Any:
    @intrinsic
    def dots(typingctx, to, to_step, q, q_step, a, b, width, like, row_like):
        """Write dot products with two rows, of elements of `row_like` at addresses; queries are of `like`.

        A query's two stand side by side; queries, and what is written of them, so many bytes apart.
        """

        def build(context, builder, signature, args):
            to, to_step, q, q_step, a, b, width, _, _ = args
            wide, element = (like.dtype for like in signature.args[7:])
            size, each = wide.bitwidth // 8, element.bitwidth // 8
            kind = floats(wide.bitwidth, LANES)
            totals = [cgutils.alloca_once_value(builder, kind(None)) for _ in range(2 * queries)]
            with cgutils.for_range(builder, builder.sdiv(width, width.type(LANES))) as loop:
                rows = [
                    _row(builder, moved(builder, row, loop.index, each * LANES), element, kind)
                    for row in (a, b)
                ]
                for i in range(queries):
                    place = moved(builder, _after(builder, q, q_step, i), loop.index, size * LANES)
                    asked = load(builder, place, kind)
                    for row, total in zip(rows, totals[2 * i : 2 * i + 2], strict=True):
                        product = builder.fmul(asked, row, flags=("contract",))
                        held = builder.load(total)
                        builder.store(builder.fadd(held, product, flags=("contract",)), total)
            for at, total in enumerate(_totals(builder, [builder.load(t) for t in totals])):
                place = _after(builder, to, to_step, at // 2)
                store(builder, builder.add(place, place.type(at % 2 * size)), total)
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
            wide, element = (like.dtype for like in signature.args[9:])
            size, each = wide.bitwidth // 8, element.bitwidth // 8
            kind = floats(wide.bitwidth, LANES)
            factors = []
            for i in range(4 * queries):
                place = _after(builder, weights, weights_step, i // 4)
                one = load(builder, builder.add(place, place.type(i % 4 * size)), kind.element)
                factors.append(spread(builder, one, kind))
            with cgutils.for_range(builder, builder.sdiv(width, width.type(LANES))) as loop:
                held = [
                    _row(builder, moved(builder, row, loop.index, each * LANES), element, kind)
                    for row in rows
                ]
                for i in range(queries):
                    place = _after(builder, to, to_step, i)
                    place = moved(builder, place, loop.index, size * LANES)
                    total = load(builder, place, kind)
                    for weight, row in zip(factors[4 * i : 4 * i + 4], held, strict=True):
                        product = builder.fmul(weight, row, flags=("contract",))
                        total = builder.fadd(total, product, flags=("contract",))
                    store(builder, place, total)
            return context.get_dummy_value()

        return types.void(
            to, to_step, weights, weights_step, a, b, c, d, width, like, row_like
        ), build

    return sums


dots_of_four, dots_of_one = _dots(4), _dots(1)
sums_of_four, sums_of_one = _sums(4), _sums(1)
