"""Writing where other ranks read: by ordinary stores, or past the cache.

A store to a line that another processor has read must first take the line from it. Inside one core complex that costs
nothing; between two (an EPYC has several, and a host moves the processors of a virtual machine among them from minute
to minute) it costs 27 ns a line, ten times the copy. Stores past the cache (non-temporal) cost the same in both, twice
an ordinary store in the first. So each rank times what it writes, and takes what was cheaper: a choice that the other
ranks never see. On processors other than x86 stores are ordinary.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from ...cuda_kernels.halves import intrinsic
from .memory import X86, memmove, put, take
from .steps import COST, GIVEN, PAST

LEAST = 1024  # bytes that are worth a choice
PIECE = 32 << 10  # bytes that are timed as one
RETRY = 128  # pieces between two trials of the other way
WORTH = 2  # the ratio of costs from which stores past the cache pay: who reads them pays too
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


@intrinsic
def copy_past(typingctx, to, of):
    """Copy a vector to an address that is a multiple of its size, past the cache."""

    def build(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(32), VECTOR // 4).as_pointer()
        value = builder.load(builder.inttoptr(args[1], vector), align=1)
        stored = builder.store(value, builder.inttoptr(args[0], vector), align=VECTOR)
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        stored.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


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


@njit(nogil=True, cache=True)
def copy_all_past(to, of, count):
    """Copy bytes past the cache; the ragged ends in the ordinary way."""
    head = min(-to % VECTOR, count)
    memmove(to, of, head)
    end = head + (count - head) // VECTOR * VECTOR
    for at in range(head, end, VECTOR):
        copy_past(to + at, of + at)
    memmove(to + end, of + end, count - end)
    fence()


@njit(nogil=True, cache=True)
def give(state, to, of, count):
    """Copy bytes to where other ranks read them, in the way that was cheaper of late."""
    if not X86 or count < LEAST:
        memmove(to, of, count)
        return
    for start in range(0, count, PIECE):
        n = min(PIECE, count - start)
        state[GIVEN] += 1
        past = state[PAST] ^ (state[GIVEN] % RETRY == 0)
        begin = cycles()
        if past:
            copy_all_past(to + start, of + start, n)
        else:
            memmove(to + start, of + start, n)
        note_cost(state, past, (cycles() - begin) * 1024 // n)


@njit(nogil=True, cache=True)
def note_cost(state, past, cost):
    """Take a lower cost at its word, a higher one with doubt: it may be another process's turn."""
    known = state[COST + past]
    if cost > known > 0:
        cost = known + (min(cost, 4 * known) - known) // 4 + 1
    state[COST + past] = max(1, cost)
    state[PAST] = 0 < WORTH * state[COST + 1] < state[COST]


@njit(nogil=True, cache=True)
def show(state, view, first, count, slot):
    """Copy elements [first, first + count) of a view to where other ranks read them."""
    if view[1] == 0:
        give(state, slot, view[0] + first * view[2], count * view[2])
    else:
        take(view, first, count, slot)


@njit(nogil=True, cache=True)
def settle(view, first, count, dense, whole):
    """Copy dense memory into elements of a view; past the cache if the whole result is more than it would keep.

    An ordinary store reads the line before it writes it, which is a third of the traffic of a large copy.
    """
    if X86 and view[1] == 0 and whole >= BEYOND:
        copy_all_past(view[0] + first * view[2], dense, count * view[2])
    else:
        put(view, first, count, dense)


# inlines memory.py and steps.py f5afdd9f
