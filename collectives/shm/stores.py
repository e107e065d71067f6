"""Writing where other ranks read: by ordinary stores, or past the cache, as ways.py has chosen for the call.

On processors other than x86 stores are ordinary.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ...cuda_kernels.halves import intrinsic
from ...cuda_kernels.kernel_cache import njit
from .memory import X86, memmove, put, take
from .steps import WAY

PAST = 0  # of state[WAY]
LEAST = 1024  # bytes that are worth stores past the cache
BEYOND = 12 << 20  # bytes of a result that is stored past the cache
VECTOR = 32  # bytes of a store past the cache


@intrinsic
def cycles(typingctx):
    """Read the processor's clock."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(64), [])
        name = "llvm.readcyclecounter"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])

    return types.int64(), build


def _vector(builder, address):
    return builder.inttoptr(address, ir.VectorType(ir.IntType(32), VECTOR // 4).as_pointer())


def _store_past(builder, value, to):
    stored = builder.store(value, _vector(builder, to), align=VECTOR)
    one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    stored.set_metadata("nontemporal", one)


@intrinsic
def copy_past(typingctx, to, of):
    """Copy a vector to an address that is a multiple of its size, past the cache."""

    def build(context, builder, signature, args):
        to, of = args
        _store_past(builder, builder.load(_vector(builder, of), align=1), to)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def copy_twice(typingctx, past, home, of):
    """Copy a vector as `copy_past`, and home in the ordinary way."""

    def build(context, builder, signature, args):
        past, home, of = args
        value = builder.load(_vector(builder, of), align=1)
        _store_past(builder, value, past)
        builder.store(value, _vector(builder, home), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def fence(typingctx):
    """Order stores past the cache before what is stored later; a release alone does not."""

    def build(context, builder, signature, args):
        if X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse.sfence"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), build


@njit(nogil=True)
def copy_all_past(to, of, count):
    """Copy bytes past the cache; the ragged ends in the ordinary way."""
    head = min(-to % VECTOR, count)
    memmove(to, of, head)
    end = head + (count - head) // VECTOR * VECTOR
    for at in range(head, end, VECTOR):
        copy_past(to + at, of + at)
    memmove(to + end, of + end, count - end)
    fence()


@njit(nogil=True)
def copy_past_and_home(past, home, of, count):
    """Copy bytes to two places, to the first past the cache, and read them once."""
    head = min(-past % VECTOR, count) if X86 else count
    end = head + (count - head) // VECTOR * VECTOR
    memmove(past, of, head)
    memmove(home, of, head)
    for at in range(head, end, VECTOR):
        copy_twice(past + at, home + at, of + at)
    memmove(past + end, of + end, count - end)
    memmove(home + end, of + end, count - end)
    fence()


@njit(nogil=True)
def give(state, to, of, count):
    """Copy bytes to where other ranks read them, in the way of the call."""
    if X86 and state[WAY] == PAST and count >= LEAST:
        copy_all_past(to, of, count)
    else:
        memmove(to, of, count)


@njit(nogil=True)
def show(state, view, first, count, slot):
    """Copy elements [first, first + count) of a view to where other ranks read them."""
    if view[1] == 0:
        give(state, slot, view[0] + first * view[2], count * view[2])
    else:
        take(view, first, count, slot)


@njit(nogil=True)
def settle(view, first, count, dense, whole):
    """Copy dense memory into elements of a view; past the cache if the whole result is more than it would keep.

    An ordinary store reads the line before it writes it, which is a third of the traffic of a large copy.
    """
    if X86 and view[1] == 0 and whole >= BEYOND:
        copy_all_past(view[0] + first * view[2], dense, count * view[2])
    else:
        put(view, first, count, dense)
