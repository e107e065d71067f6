"""Pages on their way down: copied out of the pool soon after they are full, stored behind the caller's back."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from .cache import PageCache
from .encoding import PageEncoding
from .evict.leaves import longer
from .tiers import Move, Moves

BATCH_BYTES = 16 << 20  # copied in one hold of the store's lock
BATCH_PAGES = 64
STAGE_BYTES = 64 << 20  # memory for pages under way; half of it is stored and synced together
STAGE_PAGES = 512
PATIENCE = 1.0


@dataclass(frozen=True)
class Parcel:
    """One page under way: its key, its token ids and the row that its copy stands in."""

    key: bytes
    ids: np.ndarray
    row: int


class Outbox:
    """Writes each full page that the prefix index gets down once, so that evicting it later costs nothing.

    A page that must make room before its turn is copied at once; when all memory for pages under way is taken, its
    eviction waits, `patience` seconds at most, and then the page is lost to the tiers.

    Two threads: one copies pages out under the store's lock, a few at a time, one seals them and hands them to `moves`.

    State: `admitted`, `losing` and `known` are called under the store's lock, which the sending thread never takes.

    Args:
        lock: the store's.
        patience: the longest that an eviction waits for memory.
    """

    def __init__(
        self,
        cache: PageCache,
        lock: threading.RLock,
        encoding: PageEncoding,
        moves: Moves,
        patience: float = PATIENCE,
    ) -> None:
        self._cache, self._lock, self._encoding, self._moves = cache, lock, encoding, moves
        self._patience = patience
        self._batch = max(1, min(BATCH_PAGES, BATCH_BYTES // encoding.page_bytes))
        rows = min(STAGE_PAGES, max(4 * self._batch, STAGE_BYTES // encoding.page_bytes))
        self._stage = encoding.staging(rows)
        self._group = rows // 2
        self._rows = list(range(rows))[::-1]
        self._filled: deque[Parcel] = deque()
        self._sending = 0  # parcels that left `_filled` and are not yet stored
        self._lifting = 0  # rows that the copying thread has in hand
        self._dirty = np.zeros(0, bool)
        self._change = threading.Condition()
        self._closed = False
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("pages_written", "pages_refused", "pages_dropped", "write_waits"), 0)
        )
        self._threads = [
            threading.Thread(target=work, name=f"plait-outbox-{work.__name__}", daemon=True)
            for work in (self._copy, self._send)
        ]
        for thread in self._threads:
            thread.start()

    # -- what the store tells ----------------------------------------------------------------

    def admitted(self, pages: np.ndarray) -> None:
        """The prefix index got these pages: those that are full are to be written down."""
        self._grow()
        full = pages[self._cache.pool.promised[pages] == self._cache.index.size]
        if len(full):
            self._dirty[full] = True
            with self._change:
                self._change.notify_all()

    def _grow(self) -> None:
        if len(self._dirty) < self._cache.pool.capacity:
            self._dirty = longer(self._dirty, self._cache.pool.capacity)

    def known(self, pages: np.ndarray) -> None:
        """These came from the tiers and need not go there."""
        self._grow()
        self._dirty[pages] = False

    def losing(self, pages: np.ndarray) -> None:
        """These are evicted now: copy those that were not yet."""
        self._grow()
        pages = pages[self._dirty[pages]]
        until = time.monotonic() + self._patience
        while len(pages):
            rows = self._take(len(pages), max(0.0, until - time.monotonic()))
            if not rows:
                self.counts["pages_dropped"] += len(pages)
                self._dirty[pages] = False
                return
            self._lift(pages[: len(rows)], rows)
            pages = pages[len(rows) :]

    # -- copying -----------------------------------------------------------------------------

    def _take(self, most: int, seconds: float) -> list[int]:
        """Take up to `most` free rows; none if the time is over."""
        with self._change:
            if not self._rows:
                self.counts["write_waits"] += 1
                self._change.wait_for(lambda: self._rows or self._closed, seconds)
            taken = sorted(self._rows[-most:])
            del self._rows[len(self._rows) - len(taken) :]
            return taken

    def _free(self, rows: list[int]) -> None:
        """Give rows back; the lowest are taken first, so that pages are copied in runs."""
        self._rows = sorted([*self._rows, *rows], reverse=True)

    def _lift(self, pages: np.ndarray, rows: list[int]) -> None:
        """Copy pages into as many rows, and queue them; under the store's lock."""
        index = self._cache.index
        self._cache.pool.lift(pages, self._stage.regions, np.array(rows))
        keys, ids = index.digests[pages], index.ids[pages]
        self._dirty[pages] = False
        with self._change:
            self._filled += [Parcel(keys[i].tobytes(), ids[i], row) for i, row in enumerate(rows)]
            self._change.notify_all()

    def _copy(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or (self._rows and self._dirty.any()))
                if self._closed:
                    return
                rows = sorted(self._rows[-self._batch :])
                del self._rows[-self._batch :]
                self._lifting = len(rows)
            with self._lock:
                pages = np.flatnonzero(self._dirty)[: len(rows)].astype(np.int32)
                self._lift(pages, rows[: len(pages)])
            with self._change:
                self._free(rows[len(pages) :])
                self._lifting = 0
                self._change.notify_all()

    # -- sending -----------------------------------------------------------------------------

    def _send(self) -> None:
        under_way: deque[tuple[Move | None, list[Parcel]]] = deque()
        while True:
            with self._change:
                if not under_way:
                    self._change.wait_for(lambda: self._filled or self._closed)
                count = min(len(self._filled), self._group)
                parcels = [self._filled.popleft() for _ in range(count)]
                self._sending += count
                if not parcels and not under_way:
                    return
            if parcels:
                under_way.append((self._begin(parcels), parcels))
            if len(under_way) > 1 or not parcels:
                self._end(*under_way.popleft())

    def _begin(self, parcels: list[Parcel]) -> Move | None:
        try:
            pages = [
                self._encoding.seal(parcel.key, parcel.ids, self._stage, parcel.row)
                for parcel in parcels
            ]
            return self._moves.store([parcel.key for parcel in parcels], pages)
        except Exception:  # a codec that refuses, or moves that are closed: the pages are refused
            return None

    def _end(self, move: Move | None, parcels: list[Parcel]) -> None:
        held = 0
        if move is not None:
            try:
                move.wait()
                held = sum(move.held)
            except Exception:  # a failed commit: what may be lost is not held
                held = 0
        with self._change:
            self.counts["pages_written"] += held
            self.counts["pages_refused"] += len(parcels) - held
            self._free([parcel.row for parcel in parcels])
            self._sending -= len(parcels)
            self._change.notify_all()

    # -- the end -----------------------------------------------------------------------------

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all that can be is written down and durable; say whether that was in time."""
        with self._change:
            return self._change.wait_for(
                lambda: (
                    self._closed
                    or not (self._dirty.any() or self._lifting or self._filled or self._sending)
                ),
                seconds,
            )

    def close(self) -> None:
        """End the threads, once what is copied is stored."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
