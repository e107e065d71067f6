"""The index: an append-only file of what every slot holds, so that opening reads no slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from .folder import Folder
from .form import (
    BLOCK,
    END,
    HELD,
    INDEX,
    OPENED,
    RECORD_BYTES,
    Damaged,
    Geometry,
    Record,
    pack_geometry,
    pack_record,
    read_geometry,
    read_record,
)

NAME, NEW = "index", "index.new"
CHUNK = 1 << 20
SPARE_LINES = 8192
MAX_BYTES = 1 << 30  # 8 million lines; a longer file is not one that we wrote


class Index:
    """The index file of a directory.

    Attributes:
        geometry: what its header says, or None if there is none that can be read.
        held: the last line of every slot that holds a page.
        last_seq: the highest number ever given to a page, as far as it says.
        whole: whether every line is readable; if not, the slots themselves must be asked.
        lines: how many there are.
        suspect: an append failed, so that only a rewrite is safe.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._handle: int | None = None
        self._allocated = 0
        self.geometry: Geometry | None = None
        self.held: dict[int, Record] = {}
        self.last_seq = 0
        self.lines = 0
        self.whole = self.suspect = False

    def load(self, write: bool) -> None:
        """Read the file, if there is one.

        Raises:
            FormatTooNew: if a later version wrote it.
        """
        try:
            self._handle = self._folder.open(NAME, write=write)
        except FileNotFoundError:
            return
        try:
            self._allocated = self._folder.size(self._handle)
            block = self._read(0, BLOCK)
            if len(block) < BLOCK or self._allocated > MAX_BYTES:
                return
            self.geometry, _ = read_geometry(block, INDEX)
            said = self._end()  # before the lines: a writer adds them first
            self.whole = self._replay() and said is not None and said <= self.lines
        except (Damaged, OSError):
            self.whole = False

    def _read(self, offset: int, size: int) -> bytes:
        assert self._handle is not None
        buffer = bytearray(size)
        return bytes(buffer[: self._folder.read(self._handle, [buffer], offset)])

    def _end(self) -> int | None:
        """Give how many lines the file's last line says there are; None if it is not there: the file was cut off."""
        place, rest = divmod(self._allocated - BLOCK, RECORD_BYTES)
        if rest or place < 1:
            return None
        record = read_record(self._read(self._allocated - RECORD_BYTES, RECORD_BYTES), place - 1)
        return record.seq if record is not None and record.kind == END else None

    def _replay(self) -> bool:
        """Apply line after line; say whether nothing but zeros follows the last good one, up to the file's last."""
        offset, ended, stop = BLOCK, False, self._allocated - RECORD_BYTES
        while offset < stop and (chunk := self._read(offset, min(CHUNK, stop - offset))):
            whole = len(chunk) - len(chunk) % RECORD_BYTES
            for at in range(0, whole, RECORD_BYTES):
                record = None if ended else read_record(chunk[at : at + RECORD_BYTES], self.lines)
                if record is None or record.kind == END:
                    ended = True
                    if chunk[at:].strip(b"\0"):
                        return False
                    break
                self._apply(record)
                self.lines += 1
            if not whole:
                return not chunk.strip(b"\0")
            offset += whole
        return True

    def _apply(self, record: Record) -> None:
        self.last_seq = max(self.last_seq, record.seq)
        if record.kind == HELD:
            self.held[record.slot] = record
        elif record.kind != OPENED:
            self.held.pop(record.slot, None)

    def append(self, records: Iterable[Record]) -> None:
        """Add lines and make them durable.

        Raises:
            OSError: then the file is suspect until it is rewritten.
        """
        assert self._handle is not None
        data = b"".join(pack_record(r, self.lines + i) for i, r in enumerate(records))
        offset = BLOCK + self.lines * RECORD_BYTES
        try:
            if offset + len(data) + RECORD_BYTES > self._allocated:
                self._allocated = _rounded(offset + len(data) + RECORD_BYTES)
                self._folder.preallocate(self._handle, self._allocated)
            self._write(self._handle, data, offset)
            self._mark_end(self._handle, self._allocated, self.lines + len(data) // RECORD_BYTES)
            self._folder.sync(self._handle)
        except OSError:
            self.suspect = True
            raise
        self.lines += len(data) // RECORD_BYTES

    def _write(self, handle: int, data: bytes, offset: int) -> None:
        if self._folder.write(handle, [data], offset) != len(data):
            raise OSError(f"{NAME}: short write")

    def _mark_end(self, handle: int, allocated: int, lines: int) -> None:
        """Say in the file's last line how many there are: without it, or with fewer, the file was damaged."""
        place = (allocated - BLOCK) // RECORD_BYTES - 1
        line = pack_record(Record(END, 0, lines), place)
        self._write(handle, line, allocated - RECORD_BYTES)

    def rewrite(self, geometry: Geometry, records: Iterable[Record]) -> None:
        """Put a new file in place of the old, durably, or leave the old as it is.

        Raises:
            OSError: if it could not be written.
        """
        handle = self._folder.create(NEW)
        try:
            lines = [pack_record(record, number) for number, record in enumerate(records)]
            data = b"".join(lines)
            allocated = _rounded(BLOCK + len(data) + RECORD_BYTES)
            self._folder.preallocate(handle, allocated)
            self._write(handle, pack_geometry(INDEX, geometry) + data, 0)
            self._mark_end(handle, allocated, len(lines))
            self._folder.sync(handle)
            self._folder.rename(NEW, NAME)
        except OSError:
            self._folder.close(handle)
            with contextlib.suppress(OSError):
                self._folder.unlink(NEW)
            raise
        self.close()
        self._handle, self.geometry = handle, geometry
        self._allocated = allocated
        self.lines = len(lines)
        self.suspect = True  # until its name is durable
        self._folder.sync_names()
        self.suspect = False

    def is_long(self, num_pages: int, more: int = 0) -> bool:
        """Whether it says much that is no longer so."""
        return self.lines + more > 2 * num_pages + SPARE_LINES

    def close(self) -> None:
        """Give the file back."""
        if self._handle is not None:
            self._folder.close(self._handle)
        self._handle = None


def _rounded(size: int) -> int:
    return -(-size // CHUNK) * CHUNK
