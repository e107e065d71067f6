"""Rows of several ranks added up, and sums normalised, as vectors; squares are summed in one order."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from ...cuda_kernels.norm_rows import normed_run
from ...cuda_kernels.runs import (
    RUN,
    add_product,
    folded,
    load_raw,
    load_run,
    parts_of,
    run_bytes,
    run_of,
    sums_of,
)
from ...cuda_kernels.vectors import intrinsic, ints, load, moved, store


def _ranks_sum(builder: Any, inputs: Any, ranks: Any, away: Any, element: Any, count: int) -> Any:
    """Add runs of all ranks up, in rank order: a list of parts."""
    first = load_run(builder, builder.add(load(builder, inputs, ints(64)), away), element, count)
    sums = [cgutils.alloca_once_value(builder, part) for part in first]
    with cgutils.for_range(builder, builder.sub(ranks, ranks.type(1))) as loop:
        place = moved(builder, builder.add(inputs, inputs.type(8)), loop.index, 8)
        address = builder.add(load(builder, place, ints(64)), away)
        for total, part in zip(sums, load_run(builder, address, element, count), strict=True):
            builder.store(builder.fadd(builder.load(total), part), total)
    return [builder.load(total) for total in sums]


def _adding(count: int) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, inputs, ranks, offset, residual, times = args[:6]
        element = signature.args[6].dtype
        step = run_bytes(element, count)
        squares = sums_of(builder, element, count, signature.return_type.bitwidth)
        with cgutils.for_range(builder, times) as loop:
            away = moved(builder, offset, loop.index, step)
            sums = _ranks_sum(builder, inputs, ranks, away, element, count)
            rest = load_run(builder, moved(builder, residual, loop.index, step), element, count)
            pairs = zip(sums, rest, strict=True)
            made = run_of(builder, [builder.fadd(a, b) for a, b in pairs], element)
            store(builder, moved(builder, to, loop.index, step), made)
            for total, part in zip(squares, parts_of(builder, made, element), strict=True):
                add_product(builder, total, part, part)
        return folded(builder, squares)

    return build


def _scaling(count: int) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, home, of, weight, scale, times = args[:6]
        element = signature.args[6].dtype
        step = run_bytes(element, count)
        with cgutils.for_range(builder, times) as loop:
            raw = load_raw(builder, moved(builder, of, loop.index, step), element, count)
            store(builder, moved(builder, home, loop.index, step), raw)
            weights = load_run(builder, moved(builder, weight, loop.index, step), element, count)
            held = parts_of(builder, raw, element)
            made = normed_run(builder, held, scale, weights, element)
            store(builder, moved(builder, to, loop.index, step), made)
        return context.get_dummy_value()

    return build


def _add(count: int) -> Any:
    @intrinsic
    def add(typingctx, to, inputs, ranks, offset, residual, times, like):
        """Write the ranks' runs and the residual, added and rounded once, and give the sum of the squares."""
        wide = types.float64 if like.dtype == types.float64 else types.float32
        return wide(to, inputs, ranks, offset, residual, times, like), _adding(count)

    return add


def _scale(count: int) -> Any:
    @intrinsic
    def scaled(typingctx, to, home, of, weight, scale, times, like):
        """Write what lies at `of` to `home`, and to `to` what it is by scale, rounded, by weight."""
        return types.void(to, home, of, weight, scale, times, like), _scaling(count)

    return scaled


add_runs, add_ones = _add(RUN), _add(1)
scale_runs, scale_ones = _scale(RUN), _scale(1)
