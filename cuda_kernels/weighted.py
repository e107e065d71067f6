"""Weighted sums of partials in CPU kernels: a run of numbers stays in registers while all shards are added to it.

Written as vectors: from a loop over several arrays LLVM makes a check, at each of these short runs, that none overlaps,
and the sums go through memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .halves import intrinsic

RUN = 64  # numbers whose sums fill four vectors of AVX-512; AVX2 needs half of its registers
SHORT_RUN = 16
LINE = 64  # bytes of a cache line
WORD = ir.IntType(32)
UPPER = 0xFFFF0000


def _load(builder: Any, address: Any, element: Any, count: int) -> list[Any]:
    """Load numbers as float32 or wider; of bfloat16 the even ones, and the odd ones if there are any."""

    def at(kind: Any, lanes: int) -> Any:
        vector = ir.VectorType(kind, lanes)
        return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)

    if element == types.uint16 and count > 1:  # two in a word: one operation for each half
        floats = ir.VectorType(ir.FloatType(), count // 2)
        pairs = at(WORD, count // 2)
        even = builder.shl(pairs, pairs.type([16] * (count // 2)))
        odd = builder.and_(pairs, pairs.type([UPPER] * (count // 2)))
        return [builder.bitcast(half, floats) for half in (even, odd)]
    if element == types.uint16:
        words = ir.VectorType(WORD, 1)
        wide = builder.shl(builder.zext(at(ir.IntType(16), 1), words), words([16]))
        return [builder.bitcast(wide, ir.VectorType(ir.FloatType(), 1))]
    if element == types.int16:
        return [builder.fpext(at(ir.HalfType(), count), ir.VectorType(ir.FloatType(), count))]
    kind = ir.FloatType() if element == types.float32 else ir.DoubleType()
    return [at(kind, count)]


def _rounded(builder: Any, value: Any) -> Any:
    """Round to even: words whose upper half is the bfloat16; of NaN only if its last bits are zeros, as here."""
    words = ir.VectorType(WORD, value.type.count)
    bits = builder.bitcast(value, words)
    last = builder.and_(builder.lshr(bits, words([16] * words.count)), words([1] * words.count))
    return builder.add(builder.add(bits, words([0x7FFF] * words.count)), last)


def _element(builder: Any, parts: list[Any], element: Any, count: int) -> Any:
    """Round what was loaded so and summed to elements again, as one vector."""
    if element in (types.uint16, types.int16) and parts[0].type.element != ir.FloatType():
        floats = ir.VectorType(ir.FloatType(), parts[0].type.count)
        parts = [builder.fptrunc(part, floats) for part in parts]
    if element == types.int16:
        return builder.fptrunc(parts[0], ir.VectorType(ir.HalfType(), count))
    if element != types.uint16:
        return parts[0]
    bits = [_rounded(builder, part) for part in parts]
    words = bits[0].type
    lower = builder.lshr(bits[0], words([16] * words.count))
    if count == 1:
        return builder.trunc(lower, ir.VectorType(ir.IntType(16), 1))
    return builder.or_(lower, builder.and_(bits[1], words([UPPER] * words.count)))


def _blend(count: int, past: bool) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, of, apart, shards, weights, step = args[:6]
        element, wide = (t.dtype for t in signature.args[6:8])
        lane = context.get_value_type(wide)
        halves = 2 if element == types.uint16 and count > 1 else 1
        vector = ir.VectorType(lane, count // halves)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(halves)]
        for total in sums:
            builder.store(vector([0.0] * vector.count), total)
        with cgutils.for_range(builder, shards) as loop:
            place = builder.add(weights, builder.mul(loop.index, step))
            weight = builder.load(builder.inttoptr(place, lane.as_pointer()))
            with builder.if_then(builder.fcmp_unordered("uge", weight, lane(0.0))):
                spread = builder.insert_element(vector(ir.Undefined), weight, WORD(0))
                lanes = ir.VectorType(WORD, vector.count)([0] * vector.count)
                spread = builder.shuffle_vector(spread, vector(ir.Undefined), lanes)
                address = builder.add(of, builder.mul(loop.index, apart))
                for total, held in zip(sums, _load(builder, address, element, count), strict=True):
                    if held.type != vector:
                        held = builder.fpext(held, vector)
                    product = builder.fmul(spread, held, flags=("contract",))
                    added = builder.fadd(builder.load(total), product, flags=("contract",))
                    builder.store(added, total)
        parts = [builder.load(total) for total in sums]
        made = _element(builder, parts, element, count)
        pointer = builder.inttoptr(to, made.type.as_pointer())
        stored = builder.store(made, pointer, align=LINE if past else 1)
        if past:
            one = builder.module.add_metadata([ir.Constant(WORD, 1)])
            stored.set_metadata("nontemporal", one)
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


@intrinsic
def fence(typingctx):
    """Let what was stored past the cache be seen before what is stored later."""

    def build(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build
