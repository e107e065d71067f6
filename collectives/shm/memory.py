"""Raw memory for kernels: addresses as integers, acquire and release, waiting, strided copies.

A tensor reaches a kernel as a *view*, a row of int64: address, number of dims (0: dense), bytes of an
element, then `MAX_DIMS` sizes and as many strides in bytes. Elements count in logical order, whatever
the strides, so ranks may lay the same tensor out differently.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from ...cuda_kernels.kernel_cache import njit
from ...cuda_kernels.vectors import X86, at, called, intrinsic, ints

MAX_DIMS = 6
VIEW_WORDS = 3 + 2 * MAX_DIMS

sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
# regions may be one and the same (an in-place all-gather)
memmove: Any = types.ExternalFunction("memmove", types.intp(types.intp, types.intp, types.intp))


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ints(64).as_pointer())


@intrinsic
def load(typingctx, address):
    """Read an int64 that another process writes; what it wrote before is then seen too (acquire)."""

    def build(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0]), ordering="acquire", align=8)

    return types.int64(types.int64), build


@intrinsic
def store(typingctx, address, value):
    """Write an int64 after everything written before it (release)."""

    def build(context, builder, signature, args):
        pointer = _pointer(builder, args[0])
        builder.store_atomic(args[1], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin loop."""

    def build(context, builder, signature, args):
        if X86:
            called(builder, "llvm.x86.sse2.pause")
        return context.get_dummy_value()

    return types.void(), build


@njit(nogil=True)
def idle(turns, spins):
    """Pass one turn of waiting: spin at first, then let other processes run."""
    if turns < spins:
        pause()
    else:
        sched_yield()


_U8, _U16, _U32, _U64 = (np.empty(0, f"u{n}") for n in (1, 2, 4, 8))


@njit(nogil=True)
def _copy_row(to, to_step, of, of_step, count, item):
    """Copy equally spaced elements to equally spaced places."""
    if to_step == item and of_step == item:
        memmove(to, of, count * item)
    elif item == 4:
        for i in range(count):
            carray(at(to + i * to_step, _U32), 1)[0] = carray(at(of + i * of_step, _U32), 1)[0]
    elif item == 2:
        for i in range(count):
            carray(at(to + i * to_step, _U16), 1)[0] = carray(at(of + i * of_step, _U16), 1)[0]
    elif item == 1:
        for i in range(count):
            carray(at(to + i * to_step, _U8), 1)[0] = carray(at(of + i * of_step, _U8), 1)[0]
    elif item == 8:
        for i in range(count):
            carray(at(to + i * to_step, _U64), 1)[0] = carray(at(of + i * of_step, _U64), 1)[0]
    else:
        for i in range(count):
            memmove(to + i * to_step, of + i * of_step, item)


@njit(nogil=True)
def _walk(view, first, count, dense, take):
    """Copy elements [first, first + count) of a strided view to dense memory, or from it."""
    dims, item = view[1], view[2]
    index = np.empty(MAX_DIMS, np.int64)
    rest = first
    for d in range(dims - 1, -1, -1):
        index[d] = rest % view[3 + d]
        rest //= view[3 + d]
    last = dims - 1
    step = view[3 + MAX_DIMS + last]
    while count > 0:
        address = view[0]
        for d in range(dims):
            address += index[d] * view[3 + MAX_DIMS + d]
        run = min(count, view[3 + last] - index[last])
        if take:
            _copy_row(dense, item, address, step, run, item)
        else:
            _copy_row(address, step, dense, item, run, item)
        dense += run * item
        count -= run
        index[last] += run
        d = last
        while d > 0 and index[d] == view[3 + d]:
            index[d] = 0
            d -= 1
            index[d] += 1


@njit(nogil=True)
def take(view, first, count, dense):
    """Copy elements [first, first + count) of a view into dense memory."""
    if view[1] == 0:
        memmove(dense, view[0] + first * view[2], count * view[2])
    else:
        _walk(view, first, count, dense, True)


@njit(nogil=True)
def put(view, first, count, dense):
    """Copy dense memory into elements [first, first + count) of a view."""
    if view[1] == 0:
        memmove(view[0] + first * view[2], dense, count * view[2])
    else:
        _walk(view, first, count, dense, False)


@intrinsic
def call_fold(typingctx, function, out, inputs, ranks, first, count, op, scratch):
    """Call one of the functions of fold.py by its address."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ints(64)] * 7)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), build
