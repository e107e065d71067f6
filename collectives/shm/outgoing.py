"""What a rank gives out in an exchange: its elements into its slot, or where they lie; and what it sends to itself."""

from __future__ import annotations

from ...cuda_kernels.kernel_cache import njit
from .memory import put, take
from .places import pages, place, shown_by, shown_to
from .single_copy import IN_PLACE, choose_copies, offer
from .steps import (
    KEPT,
    OFFERS,
    PLACE,
    RANK,
    SENT,
    SHOWN,
    SLOT_BYTES,
    STEP,
    WAY,
    WORLD,
    publish,
    slot_of,
    tell,
)
from .stores import BEYOND, PAST, copy_past_and_home, settle, show
from .ways import filled

# bytes for a rank in the first step of a call, and in the next
FIRST_TURN, NEXT_TURN = 512 << 10, 256 << 10


@njit(nogil=True, forceinline=True)
def turn_of(state, piece, item):
    """Count the elements for a rank in this step: first a large turn, then such as stay in the second cache."""
    return min(piece, FIRST_TURN if state[PLACE] == 0 else NEXT_TURN) // item


@njit(nogil=True, forceinline=True)
def whole_of(received, item):
    """Count the bytes that a call brings this rank."""
    elements = 0
    for r in range(received.shape[0]):
        elements += received[r, 1]
    return elements * item


@njit(nogil=True, forceinline=True)
def largest_of(sent, received):
    """Find the longest run of this rank."""
    largest = 0
    for r in range(sent.shape[0]):
        largest = max(largest, sent[r, 1], received[r, 1])
    return largest


@njit(nogil=True, forceinline=True)
def keeps(state, sends, sent, receives, received, shared, item):
    """Say whether what a rank shows is kept by it too, and can be copied to both places while it is read once."""
    rank = state[RANK]
    out, count = receives[rank if receives.shape[0] > 1 else 0], sent[rank, 1]
    if not shared or state[WAY] != PAST or sends[0, 1] or out[1] or received[rank, 1] != count:
        return False
    here, there = sends[0, 0] + sent[rank, 0] * item, out[0] + received[rank, 0] * item
    return whole_of(received, item) < BEYOND and abs(here - there) >= count * item


@njit(nogil=True, forceinline=True)
def fill(state, sends, sent, receives, received, shared, piece, item):
    """Copy this step's elements for each other rank into the own slot; and home, if the call `keeps` them."""
    rank, world, done = state[RANK], state[WORLD], state[PLACE]
    room = turn_of(state, piece, item)
    if shared:
        slot = shown_by(state, rank)
        n = min(room, sent[rank, 1] - done)
        if n > 0 and state[KEPT]:
            out = receives[rank if receives.shape[0] > 1 else 0]
            here, there = sent[rank, 0] + done, received[rank, 0] + done
            copy_past_and_home(slot, out[0] + there * item, sends[0, 0] + here * item, n * item)
        elif n > 0:
            show(state, sends[0], sent[rank, 0] + done, n, slot)
        return
    for to in range(world):
        n = min(room, sent[to, 1] - done)
        if to != rank and n > 0:
            view = sends[to if sends.shape[0] > 1 else 0]
            show(state, view, sent[to, 0] + done, n, shown_to(state, rank, to))


@njit(nogil=True, forceinline=True)
def give_out(state, sends, sent, receives, received, shared, meet, piece, item, code):
    """Fill the slot of this step, or (once for a call) show in it where the elements lie; then publish it."""
    rank, world = state[RANK], state[WORLD]
    largest = largest_of(sent, received)
    for r in range(world):
        tell(state, SENT + r, sent[r, 1])
    if state[PLACE] == 0:
        state[OFFERS] = state[KEPT] = 0
        if choose_copies(state, largest * item, meet):
            offer(state, sends, sent, receives, received, shared, item)
        if not state[OFFERS]:
            state[KEPT] = keeps(state, sends, sent, receives, received, shared, item)
    if state[OFFERS]:
        largest = 0  # the others say how many steps their elements need
        tell(state, SHOWN, IN_PLACE)  # in the header of each
    else:
        step_bytes = min(turn_of(state, piece, item), max(0, largest - state[PLACE])) * item
        span = min(pages(step_bytes), piece)
        place(state, step_bytes if shared else (world - 1) * span, span, 0)
        fill(state, sends, sent, receives, received, shared, piece, item)
    filled(state)
    publish(state, code, sent[rank, 1], largest)


@njit(nogil=True, forceinline=True)
def copy_own(state, sends, sent, receives, received, item):
    """Move what a rank sends to itself, by way of the memory behind its slot where both ends are strided."""
    rank = state[RANK]
    view = sends[rank if sends.shape[0] > 1 else 0]
    out = receives[rank if receives.shape[0] > 1 else 0]
    count = min(sent[rank, 1], received[rank, 1])
    here, there = view[0] + sent[rank, 0] * item, out[0] + received[rank, 0] * item
    if view[1] == 0 and out[1] == 0 and here == there:
        return
    if view[1] == 0:
        settle(out, received[rank, 0], count, here, whole_of(received, item))
    elif out[1] == 0:
        take(view, sent[rank, 0], count, there)
    else:
        slot = slot_of(state, rank, state[STEP]) + state[SLOT_BYTES]
        chunk = state[SLOT_BYTES] // (2 * item)
        for start in range(0, count, chunk):
            n = min(chunk, count - start)
            take(view, sent[rank, 0] + start, n, slot)
            put(out, received[rank, 0] + start, n, slot)
