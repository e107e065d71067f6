"""Steps: how the kernels of one group wait for each other, and stop waiting without losing their place.

Every collective is a row of *steps*; all members make the same steps in the same order. In step s a rank
fills its slot of set s % 2 and raises its flag of that set to 2 * s; where it then reduces its part of all
slots, it raises the flag to 2 * s + 1. Flag and header of a set share one line that only its rank writes.

Two sets are enough: a rank fills a slot for step s only after all flags show step s - 1, and a rank that
began step s - 1 has read everything of step s - 2, which used the same slots.

A kernel returns DONE, WAITING (call it again with the same arguments; `state` keeps the place) or
MISMATCH (another rank is in another call; state[STUCK] says which rank).
"""

from __future__ import annotations

from numba import carray

from ...cuda_kernels.kernel_cache import njit
from .memory import at, idle, load, store

DONE, WAITING, MISMATCH = 0, 1, 2

# words of the state, private to a rank
CONTROL, DATA, RANK, WORLD, SLOT_BYTES, STRIDE_BYTES, SPINS, SCRATCH, INPUTS = range(9)
STEP, PHASE, PLACE, PEER, STUCK = range(9, 14)
SETS = 14  # 1: steps alternate between two sets of slots; 0, one set, is for tests to see it fail
CHUNK_BYTES = 15  # of an all-reduce in a step, no more than a slot
LINE_BYTES = 16  # of a rank's line for a set
SINGLE, OFFERS, PIECES = 17, 18, 19  # see single_copy.py; of PIECES there are 7
# see ways.py; TABLES begins 504 words
WAY, WAY_WORDS, SIZE, NOTED, BEGAN, FILLING, CAME = range(26, 33)
KEPT = 33  # 1: an exchange brings its own elements home while it fills its slot
CURSORS, READY = 34, 36  # see places.py; of CURSORS there is one for each set
TABLES = 37
# from here an address for each rank, and then its process; INPUTS is where these words lie
FIRST_INPUT = TABLES + 504
# words of a line, written by one rank, read by all; from SENT what an exchange sends to each rank
FLAG, CODE, COUNT, LARGEST, PRICES, SHOWN, SPAN, SENT = range(8)

LINE = 128  # bytes; two cache lines, for processors that fetch them in pairs


def line_bytes(ranks: int) -> int:
    """Count the bytes of a rank's line for a set: one LINE up to eight ranks."""
    return -(-(SENT + ranks) * 8 // LINE) * LINE


@njit(nogil=True)
def line_of(state, rank, step):
    """Find the line of a rank for a step."""
    return state[CONTROL] + (2 * rank + (step & state[SETS])) * state[LINE_BYTES]


@njit(nogil=True)
def slot_of(state, rank, step):
    """Find the slot of a rank for a step; behind it is room for results, or for a rank's own use."""
    return state[DATA] + ((step & state[SETS]) * state[WORLD] + rank) * state[STRIDE_BYTES]


@njit(nogil=True)
def has_come(state, rank, step, level, patience):
    """Wait until a rank's flag of this step's set reaches a level; say whether it did."""
    line = line_of(state, rank, step)
    turns = 0
    while load(line) < level:
        if patience == 0 or turns >= state[SPINS] + patience:
            state[STUCK] = rank
            return False
        idle(turns, state[SPINS])
        turns += 1
    return True


@njit(nogil=True)
def all_came(state, step, level, patience):
    """Wait for the flags of all other ranks."""
    rank, world = state[RANK], state[WORLD]
    while state[PEER] < world:
        peer = state[PEER]
        if peer != rank and not has_come(state, peer, step, level, patience):
            return False
        state[PEER] += 1
    state[PEER] = 0
    return True


@njit(nogil=True)
def may_fill(state, patience):
    """Wait until nobody reads the slots that this step fills."""
    step = state[STEP]
    return all_came(state, step - 1, 2 * (step - 1), patience)


@njit(nogil=True)
def publish(state, code, count, largest):
    """Write the header of this step, then show that the slot is filled."""
    step = state[STEP]
    line = line_of(state, state[RANK], step)
    header = carray(at(line, state), SENT)
    header[CODE] = code
    header[COUNT] = count
    header[LARGEST] = largest
    store(line, 2 * step)


@njit(nogil=True)
def tell(state, word, value):
    """Write a word of the own header of this step, before it is published."""
    carray(at(line_of(state, state[RANK], state[STEP]), state), word + 1)[word] = value


@njit(nogil=True)
def header_word(state, rank, word):
    """Read a word of a rank's header of this step."""
    return carray(at(line_of(state, rank, state[STEP]), state), word + 1)[word]


@njit(nogil=True)
def agree(state, code, count):
    """Check that all ranks are in the same call."""
    for peer in range(state[WORLD]):
        if header_word(state, peer, CODE) != code or header_word(state, peer, COUNT) != count:
            state[STUCK] = peer
            return False
    return True


@njit(nogil=True)
def begin(state):
    """Forget the place in the call before."""
    state[PHASE] = state[PLACE] = state[PEER] = 0
