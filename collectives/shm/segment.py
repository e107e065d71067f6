"""Memory that the ranks of a group share: anonymous, so it is gone with the last process that maps it."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import BackendUnavailable
from .channel import RING
from .steps import LINE, line_bytes

SLOT = 1 << 20  # bytes of a rank's slot in a set, the largest chunk of a step
CHUNK = SLOT  # of an all-reduce in a step
RESULT = SLOT // 2  # place for a rank's part of a chunk, behind the slot
STRIDE = SLOT + RESULT
PAGE = 4096
# Large tensors begin at the start of a page. A copy to an address a little higher than its source modulo 4096 is
# several times slower on x86 (loads seem to depend on earlier stores), so slots begin in the middle of a page.
HALF_PAGE = PAGE // 2


class Segment:
    """A piece of shared memory, mapped into this process.

    Attributes:
        address: where it begins here.
        words: the same memory as int64.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)  # lives as long as an array or a tensor over it
        self.words = np.frombuffer(self._map, np.int64)
        self.address: int = self.words.ctypes.data

    @staticmethod
    def create(name: str, size: int) -> tuple[Segment, int]:
        """Make a segment of zeros; the file that others open must be closed when they have.

        No name stands in a file system: nothing can be left over, and a small /dev/shm (64 MB in
        a container) is no limit.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return Segment(fd, size), fd
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def open(pid: int, fd: int, size: int) -> Segment:
        """Map the segment that another process has made."""
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BackendUnavailable(
                f"backend 'shm' cannot open the memory of process {pid}: {error}. All ranks must run as one user "
                "and see each other's processes (one pid namespace); else use backend 'gloo'"
            ) from error
        try:
            return Segment(own, size)
        finally:
            os.close(own)

    @property
    def bytes(self) -> Any:
        """The memory as a buffer for torch."""
        return self._map


class SymmetricMemory:
    """Memory of all ranks in which tensors lie at one place, so that they are reduced there (see symmetric.py).

    State: all ranks' segments of each, mapped here.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known: list[tuple[list[Segment], Any, int]] = []  # with the ranks' bases, bytes

    def add(self, segments: list[Segment], bases: Any, size: int) -> None:
        """Know memory that all ranks have mapped."""
        self._known.append((segments, bases, size))

    def place_of(self, x: Tensor) -> tuple[Any, int] | None:
        """Find where in it a contiguous tensor lies: the ranks' bases and its offset."""
        if not self._known or not x.is_contiguous():
            return None
        address, size = x.data_ptr(), x.numel() * x.element_size()
        for _, bases, room in self._known:
            offset = address - int(bases[self._rank])
            if offset >= 0 and offset + size <= room:
                return bases, offset
        return None

    def forget(self) -> None:
        """Let go of all of it; tensors keep what they lie in."""
        self._known.clear()


class Layout:
    """Where things lie in the segment of a group: lines, notes, slots, rings.

    Pages that no call touches take no memory, so this is a bound: 3 MiB for each rank, and 256 KiB for each pair
    that sends.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.notes = ranks * 2 * line_bytes(ranks)
        self.data = -(-(self.notes + ranks * LINE) // PAGE) * PAGE + HALF_PAGE
        self.rings = -(-(self.data + 2 * ranks * STRIDE) // PAGE) * PAGE
        self.size = self.rings + ranks * ranks * RING

    def ring(self, sender: int, receiver: int) -> int:
        """Find the ring from one rank to another."""
        return self.rings + (sender * self.ranks + receiver) * RING

    def note(self, rank: int) -> int:
        """Find the word in which a rank leaves notes for the others (see members.py)."""
        return self.notes + rank * LINE
