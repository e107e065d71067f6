"""Weighted sums of partials in CPU kernels: a run of numbers stays in registers while all shards are added to it.

Written as vectors: from a loop over several arrays LLVM makes a check, at each of these short runs, that none overlaps,
and the sums go through memory.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from .vectors import (
    floats,
    intrinsic,
    ints,
    joined,
    load,
    load_wide,
    parted,
    rounded,
    same,
    spread,
    store,
    store_past,
)

RUN = 64  # numbers whose sums fill four vectors of AVX-512; AVX2 needs half of its registers
SHORT_RUN = 16
LINE = 64  # bytes of a cache line


def _load(builder: Any, address: Any, element: Any, count: int) -> list[Any]:
    """Load numbers as float32 or wider; of bfloat16 the even ones, and the odd ones if there are any."""
    if element == types.uint16 and count > 1:  # two in a word: one operation for each half
        return parted(builder, load(builder, address, ints(32, count // 2)))
    return [load_wide(builder, address, element, count)]


def _element(builder: Any, parts: list[Any], element: Any) -> Any:
    """Round what was loaded so and summed to elements again, as one vector."""
    if element not in (types.uint16, types.int16):
        return parts[0]
    count = parts[0].type.count
    if parts[0].type.element != floats(32):
        parts = [builder.fptrunc(part, floats(32, count)) for part in parts]
    if element == types.int16:
        return builder.fptrunc(parts[0], floats(16, count))
    if len(parts) == 2:
        return joined(builder, *parts)
    bits = rounded(builder, parts[0])
    return builder.trunc(builder.lshr(bits, same(bits.type, 16)), ints(16, count))


def _blend(count: int, past: bool) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, of, apart, shards, weights, step = args[:6]
        element, wide = (t.dtype for t in signature.args[6:8])
        halves = 2 if element == types.uint16 and count > 1 else 1
        kind = floats(wide.bitwidth, count // halves)
        sums = [cgutils.alloca_once(builder, kind) for _ in range(halves)]
        for total in sums:
            builder.store(same(kind, 0.0), total)
        with cgutils.for_range(builder, shards) as loop:
            place = builder.add(weights, builder.mul(loop.index, step))
            weight = load(builder, place, kind.element)
            with builder.if_then(builder.fcmp_unordered("uge", weight, kind.element(0.0))):
                factor = spread(builder, weight, kind)
                address = builder.add(of, builder.mul(loop.index, apart))
                for total, held in zip(sums, _load(builder, address, element, count), strict=True):
                    if held.type != kind:
                        held = builder.fpext(held, kind)
                    product = builder.fmul(factor, held, flags=("contract",))
                    added = builder.fadd(builder.load(total), product, flags=("contract",))
                    builder.store(added, total)
        made = _element(builder, [builder.load(total) for total in sums], element)
        if past:
            store_past(builder, to, made, LINE)
        else:
            store(builder, to, made)
        return context.get_dummy_value()

    return build


def _run(count: int, past: bool = False) -> Any:
    @intrinsic
    def blend(typingctx, to, of, apart, shards, weights, step, like, wide):
        """Write at address `to` the sum over shards of weight * run, of those whose weight is not below zero.

        The first shard's run is at `of` and its weight at `weights`, the next ones' `apart` and `step` bytes on;
        runs have the elements of the array `like`, weights those of `wide`.
        """
        return types.void(to, of, apart, shards, weights, step, like, wide), _blend(count, past)

    return blend


blend_run, blend_short, blend_one = _run(RUN), _run(SHORT_RUN), _run(1)
blend_past = _run(RUN, past=True)  # past the cache, to where a line of it starts
