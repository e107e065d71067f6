"""Writing where other ranks read: by ordinary stores, or past the cache, as ways.py has chosen for the call.

On processors other than x86 stores are ordinary.
"""

from __future__ import annotations

from numba import types

from ...cuda_kernels.kernel_cache import njit
from ...cuda_kernels.vectors import X86, called, fence, intrinsic, ints, load, store, store_past
from .memory import memmove, put, take
from .steps import WAY

PAST = 0  # of state[WAY]
LEAST = 1024  # bytes that are worth stores past the cache
BEYOND = 12 << 20  # bytes of a result that is stored past the cache
VECTOR = 32  # bytes of a store past the cache
WORDS = ints(32, VECTOR // 4)


@intrinsic
def cycles(typingctx):
    """Read the processor's clock."""

    def build(context, builder, signature, args):
        return called(builder, "llvm.readcyclecounter", ints(64))

    return types.int64(), build


@intrinsic
def copy_past(typingctx, to, of):
    """Copy a vector to an address that is a multiple of its size, past the cache."""

    def build(context, builder, signature, args):
        to, of = args
        store_past(builder, to, load(builder, of, WORDS), VECTOR)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def copy_twice(typingctx, past, home, of):
    """Copy a vector as `copy_past`, and home in the ordinary way."""

    def build(context, builder, signature, args):
        past, home, of = args
        held = load(builder, of, WORDS)
        store_past(builder, past, held, VECTOR)
        store(builder, home, held)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


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
