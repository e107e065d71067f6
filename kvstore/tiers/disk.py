"""The disk tier: pages in preallocated slabs, checked on every read, durable after every commit."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..spec import parse_bytes
from .catalog import Catalog
from .errors import TierError, TierReadOnly
from .folder import Folder
from .form import HELD, PageForm, Record
from .order import EvictionOrder, Lru
from .pages import PageIo, Piece
from .recovery import folder_at, open_to_read, open_to_write, reread
from .tier import Page, Tier, byte_views, check_keys

STAGING = 4  # transfers at a time; four keep a disk busy
_COUNTED = "damaged", "lost_in_sync", "lost_with_slab", "write_failures", "growth_refused"


class DiskTier(Tier):
    """Pages of one form in a directory that outlives the process.

    One process writes a directory; any number read it meanwhile (`mode="read"`), seeing what was committed when
    they opened it or called `refresh`. Both are safe for the same reason: a page is only given if its slot's
    header and bytes are the ones that were put under its key.

    Args:
        path: the directory; made if missing, 0700.
        form: what the bytes mean. Pages put with another form are kept, but are misses.
        page_bytes: bytes of the largest page, needed for a new directory.
        max_bytes: what the slabs may take on disk, such as `"200GiB"`; needed for a new directory. The index adds
            about 300 bytes a page.
        evict: which page to forget when it is full.
        mode: "write", or "read" to share a directory.

    Raises:
        TierLocked, TierRefused, FormatTooNew: see there.
        ValueError: pages larger than the directory's slots, or no room for one.
    """

    def __init__(
        self,
        path: str | Path | Folder,
        form: PageForm | None = None,
        page_bytes: int | None = None,
        max_bytes: int | str | None = None,
        evict: EvictionOrder | None = None,
        mode: Literal["write", "read"] = "write",
    ) -> None:
        if mode not in ("write", "read"):
            raise ValueError(f"mode={mode!r} must be 'write' or 'read'")
        self.mode = mode
        self.form = PageForm() if form is None else form
        self._form = self.form.encode()
        self._prefix = self.form.digest()
        self._order = Lru() if evict is None else evict
        limit = None if max_bytes is None else parse_bytes(max_bytes)
        self.folder = folder_at(path, create=mode == "write")
        try:
            if mode == "write":
                self._opened = open_to_write(self.folder, self._order, page_bytes, limit)
            else:
                self._opened = open_to_read(self.folder, page_bytes)
            self.page_bytes = page_bytes or self._opened.geometry.page_bytes
        except BaseException:
            self.folder.close_all()
            raise
        self._io = PageIo(self._opened.slabs, STAGING)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._committing = threading.Lock()
        self._dirty: set[int] = set()
        self._stuck: set[int] = set()  # leaving slots that could not be erased
        self._gone: set[int] = set()  # slabs that were deleted while they were open
        self._sync_failures = 0
        self._grow = True
        self._busy = 0  # calls that use the files now
        self._pid = os.getpid()
        self._counts: Counter[str] = Counter(
            recovered_by_scan=int(self._opened.scanned), dropped_at_open=self._opened.dropped
        )

    @property
    def _catalog(self) -> Catalog:
        return self._opened.catalog

    @contextlib.contextmanager
    def _using(self, write: bool) -> Iterator[None]:
        """Be counted as a call that uses the files: `close` waits for it."""
        if write and self.mode == "read":
            raise TierReadOnly(f"{self.folder.path} was opened with mode='read'; ask its writer")
        if write and os.getpid() != self._pid:
            raise TierReadOnly(
                f"{self.folder.path} was opened by process {self._pid}, not by this fork of it"
            )
        with self._lock:
            self.require_open()
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._changed.notify_all()

    # -- writing -----------------------------------------------------------------------------

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Write pages into free slots or into those of pages that the eviction order gives up."""
        views = byte_views(keys, pages)
        for view in views:
            if view.size > self.page_bytes:
                raise ValueError(
                    f"a page of {view.size} bytes does not fit slots of {self.page_bytes}; use another directory"
                )
        with self._using(write=True):
            return self._put([self._prefix + key for key in keys], views)

    def _put(self, keys: list[bytes], views: list[np.ndarray]) -> list[bool]:
        held = [False] * len(keys)
        pieces: list[Piece] = []
        others: list[int] = []  # another call is writing them, or this one a place before
        try:
            with self._lock:
                failures = self._sync_failures
                for i, (key, view) in enumerate(zip(keys, views, strict=True)):
                    if key in self._catalog.slots:
                        self._catalog.use(key)
                        held[i] = True
                    elif key in self._catalog.writing:
                        others.append(i)
                    elif (record := self._claim(key, view.size)) is not None:
                        pieces.append(Piece(i, record, view, "not written"))
            for run in self._io.runs(pieces):
                self._io.write(run, self._form)
                self._publish(run, failures)
        finally:
            self._unclaim([piece for piece in pieces if piece.wrong is not None])
        for piece in pieces:
            held[piece.index] = piece.wrong is None
        with self._lock:
            for i in others:
                self._changed.wait_for(lambda key=keys[i]: key not in self._catalog.writing)
                held[i] = keys[i] in self._catalog.slots
        return held

    def _claim(self, key: bytes, length: int) -> Record | None:
        catalog = self._catalog
        if not catalog.num_free and self._grow:
            try:
                slots = self._opened.slabs.grow()
                catalog.add_slots(range(0) if slots is None else slots)
                self._grow = slots is not None
            except OSError:
                # no room: make do with what there is, and ask again after a commit
                self._grow = False
                self._counts["growth_refused"] += 1
        return catalog.claim(key, length)

    def _publish(self, run: list[Piece], failures: int) -> None:
        with self._lock:
            for piece in run:
                if piece.wrong is None and failures != self._sync_failures:
                    piece.wrong = "a sync failed meanwhile"
                if piece.wrong is None:
                    self._catalog.publish(piece.record)
                    self._dirty.add(self._slab(piece.record.slot))
            self._changed.notify_all()

    def _unclaim(self, pieces: list[Piece]) -> None:
        if not pieces:
            return
        with self._lock:
            for piece in pieces:
                self._catalog.unclaim(piece.record)
                self._counts["write_failures"] += 1
            self._changed.notify_all()
        self._erase([piece.record.slot for piece in pieces])

    def _slab(self, slot: int) -> int:
        return slot // self._opened.geometry.slots_per_slab

    def remove(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget pages and erase their headers."""
        check_keys(keys)
        with self._using(write=True):
            with self._lock:
                dropped = [self._catalog.drop(self._prefix + key) for key in keys]
            self._erase([slot for slot in dropped if slot is not None])
        return [slot is not None for slot in dropped]

    def _erase(self, slots: list[int]) -> None:
        """Make leaving slots free; those that cannot be erased now stay, and `commit` tries again."""
        for slot in slots:
            try:
                self._opened.slabs.erase(slot)
                with self._lock:
                    self._catalog.free(slot)
                    self._dirty.add(self._slab(slot))
            except OSError:
                with self._lock:
                    self._stuck.add(slot)

    def commit(self) -> None:
        """Sync the slabs, then append to the index and sync it: two syncs for any number of pages."""
        with self._using(write=True):
            self._commit()

    def _commit(self) -> None:
        with self._committing:
            with self._lock:
                stuck, self._stuck = self._stuck, set()
            self._erase(sorted(stuck))
            with self._lock:
                records, dirty = self._catalog.take_pending(), self._dirty
                self._dirty = set()
                self._grow = True
                if self._busy <= 1:  # only this call: nobody reads or writes a slab that is gone
                    while self._gone:
                        self._opened.slabs.drop(self._gone.pop())
            records = self._sync_slabs(records, dirty)
            try:
                self._extend_index(records)
            except OSError as error:
                with self._lock:
                    self._catalog.put_back(records)
                raise TierError(f"commit: the index could not be written: {error}") from error
            if stuck & self._stuck:
                raise TierError(
                    f"commit: {len(stuck)} removed pages could not be erased; commit again"
                )

    def _sync_slabs(self, records: dict[int, Record], dirty: set[int]) -> dict[int, Record]:
        """Make the slabs' content durable; give the records without those of slabs that are gone."""
        try:
            for number in sorted(dirty - self._gone):
                try:
                    self._opened.slabs.sync(number)
                except FileNotFoundError:
                    records = self._lose_slab(number, records)
        except OSError as error:
            # The system may have thrown away what it could not write, of any page since the last good sync.
            with self._lock:
                self._sync_failures += 1
                self._dirty |= dirty
                self._catalog.put_back(records)
                lost = [r for r in self._catalog.pending.values() if r.kind == HELD]
                slots = [self._catalog.drop(record.key) for record in lost]
                self._counts["lost_in_sync"] += len(lost)
            self._erase([slot for slot in slots if slot is not None])
            raise TierError(
                f"commit: {len(lost)} pages could not be made durable: {error}"
            ) from error
        return records

    def _lose_slab(self, number: int, records: dict[int, Record]) -> dict[int, Record]:
        """Somebody deleted a slab: its pages are lost, the others are not."""
        slots = self._opened.slabs.slots(number)
        with self._lock:
            self._sync_failures += 1  # what is being written there is not held
            self._counts["lost_with_slab"] += self._catalog.lose(slots)
            self._stuck.difference_update(slots)
            self._gone.add(number)
        return {slot: record for slot, record in records.items() if slot not in slots}

    def _extend_index(self, records: dict[int, Record]) -> None:
        index, catalog = self._opened.index, self._catalog
        if index.suspect or index.is_long(len(catalog.slots), len(records)):
            with self._lock:
                kept = catalog.durable()
            index.rewrite(self._opened.geometry, kept)
        elif records:
            index.append(records.values())

    # -- reading -----------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Read pages and check them; a page that is not what was put is counted, dropped, and a miss."""
        views = byte_views(keys, out, writable=True)
        with self._using(write=False):
            pieces = self._find(keys, views)
            for run in self._io.runs(pieces):
                self._io.read(run)
            found: list[int | None] = [None] * len(keys)
            for piece in pieces:
                if piece.wrong is None:
                    found[piece.index] = piece.record.length
                else:
                    self._spoiled(piece)
        return found

    def _find(self, keys: Sequence[bytes], views: list[np.ndarray]) -> list[Piece]:
        with self._lock:
            records = [self._catalog.find(self._prefix + key) for key in keys]
            for record, view in zip(records, views, strict=True):
                if record is not None and view.size < record.length:
                    raise ValueError(
                        f"a page of {record.length} bytes does not fit a buffer of {view.size}"
                    )
            for record in records:
                if record is not None:
                    self._catalog.use(record.key)
        return [
            Piece(i, record, view)
            for i, (record, view) in enumerate(zip(records, views, strict=True))
            if record is not None
        ]

    def _spoiled(self, piece: Piece) -> None:
        with self._lock:
            at = self._catalog.find(piece.record.key)
            if at is None or at.seq != piece.record.seq:
                return  # it was evicted while we read: an ordinary miss
            self._counts["damaged"] += 1
            slot = self._catalog.drop(piece.record.key, piece.record.seq)
        if slot is not None and self.mode == "write":
            self._erase([slot])

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Say which pages the index has."""
        check_keys(keys)
        with self._lock:
            self.require_open()
            return [self._prefix + key in self._catalog.slots for key in keys]

    def refresh(self) -> None:
        """In mode "read": see what the writer committed since; in mode "write" there is nothing to see."""
        if self.mode == "read":
            with self._using(write=False):
                opened = reread(self._opened)
                with self._lock:
                    self._opened = opened

    # -- accounts ----------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """Pages held, and what happened to others since the directory was opened.

        In mode "read", `damaged` also counts pages that the writer has meanwhile replaced.
        """
        with self._lock:
            return {
                "pages": len(self._catalog.slots),
                "evicted": self._catalog.evicted,
                "leaving": len(self._catalog.leaving),
                **dict.fromkeys(_COUNTED, 0),
                **self._counts,
            }

    def check_integrity(self) -> None:
        """Prove that every slot is in one state, and every key in one slot.

        Raises:
            IntegrityError: naming what does not hold.
        """
        with self._lock:
            self._catalog.check_integrity()

    def close(self) -> None:
        """Commit, then let go of the directory, also if the commit failed."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._changed.wait_for(lambda: not self._busy)
        with contextlib.ExitStack() as last:
            last.callback(self.folder.close_all)
            last.callback(self._opened.index.close)
            last.callback(self._opened.slabs.close)
            if self.mode == "write" and os.getpid() == self._pid:
                self._commit()
