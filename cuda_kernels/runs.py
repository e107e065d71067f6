"""Runs of numbers in CPU kernels: so many elements of a row, widened, summed, and made elements again.

Written as vectors: from a loop over several arrays LLVM makes a check, at each of these short runs, that none overlaps,
and the sums go through memory.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from .vectors import floats, ints, joined, load, parted, rounded, same, shuffled, widened

RUN = 64  # numbers that fill four vectors of AVX-512 when widened; AVX2 needs half of its registers


def run_bytes(element: Any, count: int) -> int:
    return count * element.bitwidth // 8


def load_run(builder: Any, address: Any, element: Any, count: int) -> list[Any]:
    """Load numbers as float32 or wider; of bfloat16 the even ones, and the odd ones if there are any."""
    return parts_of(builder, load_raw(builder, address, element, count), element)


def load_raw(builder: Any, address: Any, element: Any, count: int) -> Any:
    """Load numbers as one vector of what `run_of` makes."""
    if element == types.uint16:  # two in a word: one operation for each half
        kind = ints(32, count // 2) if count > 1 else ints(16, 1)
    else:
        kind = floats(element.bitwidth, count)
    return load(builder, address, kind)


def parts_of(builder: Any, run: Any, element: Any) -> list[Any]:
    """Widen what `run_of` made or `load_raw` loaded, as `load_run` gives it."""
    if element == types.int16:
        return [builder.fpext(run, floats(32, run.type.count))]
    if element != types.uint16:
        return [run]
    return [widened(builder, run)] if run.type == ints(16, 1) else parted(builder, run)


def run_of(builder: Any, parts: list[Any], element: Any) -> Any:
    """Round what was loaded so and computed with to elements again, as one vector."""
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


def sums_of(builder: Any, element: Any, count: int, bits: int) -> list[Any]:
    """Make variables for sums in floats of so many bits: one for each part of a run."""
    halves = 2 if element == types.uint16 and count > 1 else 1
    kind = floats(bits, count // halves)
    sums = [cgutils.alloca_once(builder, kind) for _ in range(halves)]
    for total in sums:
        builder.store(same(kind, 0.0), total)
    return sums


def add_product(builder: Any, total: Any, a: Any, b: Any) -> None:
    """Add a * b to a sum, rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def folded(builder: Any, sums: list[Any]) -> Any:
    """Add up the parts and their lanes, always in one order: half to half, down to one."""
    parts = [builder.load(total) for total in sums]
    whole = parts[0] if len(parts) == 1 else builder.fadd(*parts)
    while whole.type.count > 1:
        half = whole.type.count // 2
        low, high = (shuffled(builder, range(first, first + half), whole) for first in (0, half))
        whole = builder.fadd(low, high)
    return builder.extract_element(whole, ints(32)(0))
