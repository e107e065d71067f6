"""A one-way ring of cells between two ranks: the kernels of sending and receiving."""

from __future__ import annotations

from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .memory import at, idle, load, put, store
from .steps import DONE, LINE, NOTED, WAITING, WAY
from .stores import PAST, show

DEPTH = 8  # cells of a ring
CELL = 32 << 10  # bytes of a cell
RING = (2 + DEPTH) * LINE + DEPTH * CELL  # counter of the sender, of the receiver, headers, cells
SPINS = 50  # turns of waiting before others may run
BYTES, TAG, CODE = range(3)  # words of a header


@njit(nogil=True)
def _differs(ring, room, patience):
    """Wait until the ring holds something (room = 0), or has room for a cell (room = 1)."""
    turns = 0
    while load(ring) - load(ring + LINE) == room * DEPTH:
        if turns >= patience:
            return False
        idle(turns, SPINS)
        turns += 1
    return True


@njit(nogil=True)
def push(state, ring, view, cursor, count, tag, code, patience):
    """Put the rest of a message into the ring, as far as there is room; cursor[0] elements are in it already."""
    item = view[2]
    state[WAY] = PAST  # cheapest for cells
    state[NOTED] = 0  # a collective that waits meanwhile is not timed
    while _differs(ring, 1, patience):
        sent = load(ring)
        cell = sent % DEPTH
        n = min(CELL // item, count - cursor[0])
        header = carray(at(ring + (2 + cell) * LINE, cursor), 3)
        header[BYTES] = count * item
        header[TAG] = tag
        header[CODE] = code
        show(state, view, cursor[0], n, ring + (2 + DEPTH) * LINE + cell * CELL)
        store(ring, sent + 1)
        cursor[0] += n
        if cursor[0] >= count:
            return DONE
    return WAITING


@njit(nogil=True)
def look(ring, header, patience):
    """Read the header of the next cell, if there is one."""
    if not _differs(ring, 0, patience):
        return False
    cell = load(ring + LINE) % DEPTH
    header[:] = carray(at(ring + (2 + cell) * LINE, header), 3)
    return True


@njit(nogil=True)
def pull(ring, view, cursor, count, patience):
    """Take the rest of a message out of the ring, as far as it has come."""
    item = view[2]
    while _differs(ring, 0, patience):
        taken = load(ring + LINE)
        cell = taken % DEPTH
        n = min(CELL // item, count - cursor[0])
        put(view, cursor[0], n, ring + (2 + DEPTH) * LINE + cell * CELL)
        store(ring + LINE, taken + 1)
        cursor[0] += n
        if cursor[0] >= count:
            return DONE
    return WAITING
