"""Weighted sums of partials in CPU kernels: a run of numbers stays in registers while all shards are added to it."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from .runs import RUN, add_product, load_run, run_bytes, run_of, sums_of
from .vectors import LINE, fetch, intrinsic, load, spread, store, store_past

SHORT_RUN = 16
# bytes of each shard that are brought near before they are needed, if they come from memory
AHEAD = 16 << 10


def _blend(count: int, far: bool, past: bool) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, of, apart, shards, weights, step = args[:6]
        element, wide = (t.dtype for t in signature.args[6:8])
        sums = sums_of(builder, element, count, wide.bitwidth)
        kind = sums[0].type.pointee
        with cgutils.for_range(builder, shards) as loop:
            place = builder.add(weights, builder.mul(loop.index, step))
            weight = load(builder, place, kind.element)
            with builder.if_then(builder.fcmp_unordered("uge", weight, kind.element(0.0))):
                factor = spread(builder, weight, kind)
                address = builder.add(of, builder.mul(loop.index, apart))
                if far:
                    later = builder.add(address, address.type(AHEAD))
                    fetch(builder, later, run_bytes(element, count))
                for total, held in zip(
                    sums, load_run(builder, address, element, count), strict=True
                ):
                    if held.type != kind:
                        held = builder.fpext(held, kind)
                    add_product(builder, total, factor, held)
        made = run_of(builder, [builder.load(total) for total in sums], element)
        if past:
            store_past(builder, to, made, LINE)
        else:
            store(builder, to, made)
        return context.get_dummy_value()

    return build


def _run(count: int, far: bool = False, past: bool = False) -> Any:
    @intrinsic
    def blend(typingctx, to, of, apart, shards, weights, step, like, wide):
        """Write at address `to` the sum over shards of weight * run, of those whose weight is not below zero.

        The first shard's run is at `of` and its weight at `weights`, the next ones' `apart` and `step` bytes on;
        runs have the elements of the array `like`, weights those of `wide`.
        """
        signature = types.void(to, of, apart, shards, weights, step, like, wide)
        return signature, _blend(count, far, past)

    return blend


blend_run, blend_short, blend_one = _run(RUN), _run(SHORT_RUN), _run(1)
blend_far = _run(RUN, far=True)  # of partials that come from memory
blend_past = _run(RUN, far=True, past=True)  # and past the cache, to where a line of it starts
