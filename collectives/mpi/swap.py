"""Equal parts between all ranks of a group: all messages of a call, started and waited for by one kernel.

mpi4py takes a microsecond to prepare a message, as long as a short one travels. The kernel calls the functions of the
MPI that mpi4py is linked with by their addresses, and waits no longer than it is told: what has not arrived by then is
given to the caller as mpi4py's requests.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numba import carray, types

from ...cuda_kernels.kernel_cache import njit
from ...cuda_kernels.vectors import called_at, intrinsic, ints
from ..shm.fold import BLOCK, SCRATCH_BYTES
from ..shm.memory import at, call_fold, memmove

SPINS = 300  # tests of a blocking call, before other threads and ranks go first
MOST_BYTES = (1 << 31) - 1  # of a message: MPI counts in 32 bits
# Open MPI asks the receiver first where a message between two processes of a host is longer: 4.3 us instead of 1.7.
# So what is a little longer goes in pieces (4 KB: 2.2 us, 8 KB: 2.9, 12 KB: 3.9 instead of 4.9).
PIECE, MOST_PIECES = 4000, 3
LINE = 64  # parts begin at cache lines

# words that describe a communicator
RECEIVE, SEND, TEST, COMM, BYTE, RANK, SIZE = range(7)
# words of a room, private to a call
SCRATCH, MEMORY, FLAG, STATUS = range(4)
INPUTS = STATUS + 32  # no MPI's status is longer
INT = np.empty(0, np.int32)


@dataclass(frozen=True)
class Fold:
    """How elements are reduced: a function of shm/fold.py, its operator, bytes of an element."""

    function: int
    op: int
    item: int


class Room:
    """What one call needs for itself: words for the kernel, scratch memory, and memory for what comes."""

    def __init__(self, ranks: int, n_bytes: int) -> None:
        self.words = np.zeros(INPUTS + ranks * (1 + 2 * MOST_PIECES), np.int64)
        self._memory = np.empty(SCRATCH_BYTES + n_bytes + LINE, np.uint8)
        start = -(-self._memory.ctypes.data // LINE) * LINE
        self.words[[SCRATCH, MEMORY]] = start, start + SCRATCH_BYTES


class Swap:
    """Exchanges of one communicator.

    State: rooms, as many as calls were ever under way at once; MPI may write into those of calls that failed. A list's
    own steps are whole between threads.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        library = ctypes.CDLL(MPI.__file__)  # finds what mpi4py itself is linked with
        functions = (library.MPI_Irecv, library.MPI_Isend, library.MPI_Test)
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        handles = comm.handle, MPI.BYTE.handle
        self._words = as_words([*addresses, *handles, comm.rank, comm.size])
        self._size = comm.size
        self._rooms: list[Room] = []
        self._free: defaultdict[int, list[Room]] = defaultdict(list)

    def move(
        self, send: int, send_step: int, to: int, to_step: int, n: int, tag: int, spins: int
    ) -> Iterator[list[MPI.Request]]:
        """Send `n` bytes to each rank; what comes, and the own part, is put in its place.

        Args:
            send: where the part for rank 0 lies; that for rank r is `r * send_step` behind it. The same for `to`.
            spins: tests until the rest is left to the caller.
        """
        room = self._room(0)
        left = move(self._words, room.words, send, send_step, to, to_step, n, tag, spins)
        if left:
            yield self._left(room, left)
        self._free[0].append(room)

    def reduce(
        self, send: int, send_step: int, out: int, n: int, by: Fold, tag: int, spins: int
    ) -> Iterator[list[MPI.Request]]:
        """Send `n` bytes to each rank; what comes is reduced with the own part, in the order of ranks, into `out`."""
        bits = n.bit_length()
        room = self._room(bits)
        what = (self._words, room.words, send, send_step, out, n, by.function, by.op, by.item)
        left = move_and_fold(*what, tag, spins)
        if left:
            yield self._left(room, left)
            fold(*what)
        self._free[bits].append(room)

    def _room(self, bits: int) -> Room:
        try:
            return self._free[bits].pop()
        except IndexError:
            self._rooms.append(Room(self._size, self._size * ((1 << bits) + LINE)))
            return self._rooms[-1]

    def _left(self, room: Room, left: int) -> list[MPI.Request]:
        if left < 0:
            raise MPI.Exception(-left)
        first = INPUTS + self._size
        handles = room.words[first : first + left].tolist()
        return [MPI.Request.fromhandle(handle) for handle in handles]


def as_words(numbers: Sequence[int | None]) -> np.ndarray:
    """Write addresses and handles as the kernel's words: MPICH's are ints below 0, and mpi4py gives them unsigned."""
    return np.array(numbers, np.uint64).view(np.int64)


def in_pieces(n: int) -> int:
    """Give the length of the pieces in which messages of so many bytes go; the same on both ends."""
    return PIECE if n <= MOST_PIECES * PIECE else n


piece_of = njit(nogil=True)(in_pieces)


@intrinsic
def message(typingctx, function, address, count, kind, peer, tag, comm, request):
    """Call MPI_Isend or MPI_Irecv. Handles are pointers or ints: whoever takes an int reads the lower half."""

    def build(context, builder, signature, args):
        short = (2, 4, 5)  # count, peer, tag
        given = [builder.trunc(x, ints(32)) if i in short else x for i, x in enumerate(args)]
        return builder.sext(called_at(builder, args[0], given[1:]), ints(64))

    return types.int64(*[types.int64] * 8), build


@intrinsic
def test(typingctx, function, request, flag, status):
    """Call MPI_Test."""

    def build(context, builder, signature, args):
        return builder.sext(called_at(builder, args[0], args[1:]), ints(64))

    return types.int64(*[types.int64] * 4), build


@njit(nogil=True)
def start(group, room, send, send_step, to, to_step, n, tag):
    """Start all messages; give their number, or MPI's error below 0."""
    rank, size, started, piece = group[RANK], group[SIZE], 0, max(1, piece_of(n))
    for function, address, step in (
        (group[RECEIVE], to, to_step),
        (group[SEND], send, send_step),
    ):
        for i in range(1, size):
            peer = (rank + i) % size
            for at_byte in range(0, max(1, n), piece):
                place, part = address + peer * step + at_byte, min(piece, n - at_byte)
                request = room.ctypes.data + 8 * (INPUTS + size + started)
                code = message(function, place, part, group[BYTE], peer, tag, group[COMM], request)
                if code:
                    return -code
                started += 1
    return started


@njit(nogil=True)
def finish(group, room, left, spins):
    """Test the last of so many requests until it is complete, then the one before; give how many are left."""
    words = room.ctypes.data
    flag = carray(at(words + 8 * FLAG, INT), 1)
    while left > 0:
        request = words + 8 * (INPUTS + group[SIZE] + left - 1)
        code = test(group[TEST], request, words + 8 * FLAG, words + 8 * STATUS)
        if code:
            return -code
        if flag[0]:
            left -= 1
        elif spins:
            spins -= 1
        else:
            break
    return left


@njit(nogil=True)
def move(group, room, send, send_step, to, to_step, n, tag, spins):
    """Exchange parts, and bring the own one home while the others travel."""
    left = start(group, room, send, send_step, to, to_step, n, tag)
    own, home = send + group[RANK] * send_step, to + group[RANK] * to_step
    if own != home:
        memmove(home, own, n)
    return finish(group, room, left, spins)


@njit(nogil=True)
def fold(group, room, send, send_step, out, n, function, op, item):
    """Reduce what came with the own part, a block at a time; blocks lie apart, so that the loops are of vectors."""
    rank, size = group[RANK], group[SIZE]
    for r in range(size):
        room[INPUTS + r] = room[MEMORY] + r * line_up(n)
    room[INPUTS + rank] = send + rank * send_step
    inputs, scratch = room.ctypes.data + 8 * INPUTS, room[SCRATCH]
    block = scratch + BLOCK * 8
    for first in range(0, n // item, BLOCK):
        count = min(BLOCK, n // item - first)
        call_fold(function, block, inputs, size, first, count, op, scratch)
        memmove(out + first * item, block, count * item)


@njit(nogil=True)
def move_and_fold(group, room, send, send_step, out, n, function, op, item, tag, spins):
    """Do both, the latter if everything has arrived."""
    left = start(group, room, send, send_step, room[MEMORY], line_up(n), n, tag)
    left = finish(group, room, left, spins)
    if left == 0:
        fold(group, room, send, send_step, out, n, function, op, item)
    return left


@njit(nogil=True)
def line_up(n):
    """Round bytes up to whole cache lines."""
    return (n + LINE - 1) // LINE * LINE


_WORDS, _WORD = types.Array(types.int64, 1, "C"), types.int64


def compile_kernels() -> None:
    """Compile them for their one signature, or load them from the cache, before a rank can wait for it."""
    for kernel, n_numbers in ((move, 7), (fold, 7), (move_and_fold, 9)):
        if not kernel.signatures:
            kernel.compile((_WORDS, _WORDS, *[_WORD] * n_numbers))
            kernel.disable_compile()
