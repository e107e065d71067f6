"""The slab files: preallocated, cut into slots; and the memory that their I/O goes through."""

from __future__ import annotations

import contextlib
import queue
import re
from collections.abc import Iterator

import numpy as np

from .folder import Folder
from .form import BLOCK, SLAB, Damaged, Geometry, pack_geometry, read_geometry
from .memory import aligned_region

SLAB_NAME = re.compile(r"slab-(\d{5})")
OURS = re.compile(r"(lock|index(\.new)?|secret(\.new)?|slab-\d{5}(\.new)?)")
MAX_SLABS = 100_000


def slab_name(number: int) -> str:
    """The file of a slab."""
    return f"slab-{number:05d}"


class Staging:
    """A fixed number of aligned buffers; who wants one more waits. Bounds the memory of all I/O."""

    def __init__(self, count: int, size: int) -> None:
        self._free: queue.LifoQueue[np.ndarray] = queue.LifoQueue()
        for row in aligned_region(count, size):
            self._free.put(row)

    @contextlib.contextmanager
    def take(self) -> Iterator[np.ndarray]:
        """Have one buffer for a while."""
        row = self._free.get()
        try:
            yield row
        finally:
            self._free.put(row)


class Slabs:
    """The slab files of a directory, opened as needed.

    State: `grow` and `close` under the tier's lock; reads and writes from any thread.
    """

    def __init__(self, folder: Folder, geometry: Geometry, max_slabs: int, write: bool) -> None:
        self.folder, self.geometry, self.max_slabs = folder, geometry, max_slabs
        self._write = write
        self._handles: dict[int, int] = {}
        self._block = aligned_region(1, BLOCK)[0]
        self.open_new()

    def open_new(self) -> None:
        """Open the slabs that are there and not open yet; a writer removes those past its limit."""
        for number in slab_numbers(self.folder):
            if number < self.max_slabs and number not in self._handles:
                handle = self.folder.open(slab_name(number), write=self._write, direct=True)
                self._handles[number] = handle
                if self._write:
                    self._mend(number)
            elif number >= self.max_slabs and self._write:
                self.folder.unlink(slab_name(number))

    def _mend(self, number: int) -> None:
        """Give a slab its length and header back, if it lost them."""
        handle = self._handles[number]
        if self.folder.size(handle) < self.geometry.slab_bytes:
            self.folder.preallocate(handle, self.geometry.slab_bytes)
        self.folder.read(handle, [self._block], 0)
        wanted = pack_geometry(SLAB, self.geometry, number)
        if self._block.tobytes() != wanted:
            self._block[:] = np.frombuffer(wanted, np.uint8)
            self.folder.write(handle, [self._block], 0)
            self.folder.sync(handle)

    @property
    def numbers(self) -> list[int]:
        """Slabs that are there."""
        return sorted(self._handles)

    def slots(self, number: int) -> range:
        """Slots of one slab."""
        count = self.geometry.slots_per_slab
        return range(number * count, (number + 1) * count)

    def grow(self) -> range | None:
        """Make one more slab; give its slots, or None if there may be no more.

        Raises:
            OSError: if the disk is full, among others; then there is no new file.
        """
        missing = (n for n in range(self.max_slabs) if n not in self._handles)
        number = next(missing, None)
        if number is None:
            return None
        new = slab_name(number) + ".new"
        handle = self.folder.create(new, direct=True)
        try:
            self.folder.preallocate(handle, self.geometry.slab_bytes)
            self._block[:] = np.frombuffer(pack_geometry(SLAB, self.geometry, number), np.uint8)
            if self.folder.write(handle, [self._block], 0) != BLOCK:
                raise OSError(f"{new}: short write")
            self.folder.sync(handle)
            self.folder.rename(new, slab_name(number))
            self.folder.sync_names()
        except OSError:
            self.folder.close(handle)
            for name in (new, slab_name(number)):  # it may have its name, but not durably
                with contextlib.suppress(OSError):
                    self.folder.unlink(name)
            raise
        self._handles[number] = handle
        return self.slots(number)

    def _locate(self, slot: int) -> tuple[int, int]:
        number, inside = divmod(slot, self.geometry.slots_per_slab)
        if number not in self._handles:
            raise FileNotFoundError(f"{slab_name(number)} is missing")
        return self._handles[number], BLOCK + inside * self.geometry.slot_bytes

    def read(self, slot: int, buffers: list[np.ndarray]) -> int:
        """Read from the beginning of a slot on."""
        handle, offset = self._locate(slot)
        return self.folder.read(handle, buffers, offset)

    def write(self, slot: int, buffers: list[np.ndarray]) -> int:
        """Write from the beginning of a slot on."""
        handle, offset = self._locate(slot)
        return self.folder.write(handle, buffers, offset)

    def erase(self, slot: int) -> None:
        """Overwrite a slot's header, so that no recovery finds the page again.

        Raises:
            OSError: if it cannot be done now.
        """
        if self.write(slot, [_ZEROS]) != BLOCK:
            raise OSError(f"slot {slot}: short write")

    def sync(self, number: int) -> None:
        """Make a slab's content durable."""
        if number in self._handles:
            self.folder.sync(self._handles[number])

    def drop(self, number: int) -> None:
        """Give back a slab whose file is gone; `grow` may make it again. No transfer may be under way."""
        self.folder.close(self._handles.pop(number))

    def close(self) -> None:
        """Give the files back."""
        for handle in self._handles.values():
            self.folder.close(handle)
        self._handles.clear()


def slab_numbers(folder: Folder) -> list[int]:
    """Numbers of the slab files in a directory."""
    found = [SLAB_NAME.fullmatch(name) for name in folder.names()]
    return [int(match[1]) for match in found if match]


def read_slab_geometry(folder: Folder, number: int) -> Geometry:
    """Read how a slab says it is cut.

    Raises:
        Damaged: if it does not say.
        FormatTooNew: if a later version wrote it.
    """
    handle = folder.open(slab_name(number))
    block = bytearray(BLOCK)
    try:
        if folder.read(handle, [block], 0) != BLOCK:
            raise Damaged("short file")
    finally:
        folder.close(handle)
    geometry, said = read_geometry(bytes(block), SLAB)
    if said != number:
        raise Damaged(f"is slab {said}")
    return geometry


_ZEROS = aligned_region(1, BLOCK)[0]
_ZEROS.flags.writeable = False
