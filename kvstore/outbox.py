"""Pages on their way down: copied out of the pool soon after they are full, stored behind the caller's back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .cache import PageCache
from .encoding import PageEncoding
from .evict.leaves import longer
from .tiers import Move, Moves, TierClosed

BATCH_BYTES = 2 << 20  # copied in one hold of the store's lock, and still in the caches when sealed
GROUP_BYTES = 8 << 20  # stored with one call
BATCH_PAGES = 64  # the most of either
STAGE_BYTES = 64 << 20  # memory for pages under way
STAGE_PAGES = 512
PATIENCE = 1.0


@dataclass
class Parcel:
    """One page under way: its key, its token ids, the row that its copy stands in, and its bytes once it is sealed."""

    key: bytes
    ids: np.ndarray
    row: int
    data: np.ndarray | None = None


class Outbox:
    """Writes each full page that the prefix index gets down once, so that evicting it later costs nothing.

    A page that must make room before its turn is copied at once; when all memory for pages under way is taken, its
    eviction waits, `patience` seconds at most, and then the page is lost to the tiers.

    One thread copies pages out under the store's lock, a few at a time, seals them and hands them to `moves`.

    State: `admitted`, `losing` and `known` are called under the store's lock. Whoever has both takes that one first.

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
        self._group = min(BATCH_PAGES, -(-GROUP_BYTES // encoding.page_bytes))
        rows = min(STAGE_PAGES, max(4 * self._group, STAGE_BYTES // encoding.page_bytes))
        self._stage = encoding.staging(rows)
        self._rows = list(range(rows))[::-1]
        self._evicted: list[Parcel] = []  # copied by who evicted them, to be sealed
        self._under_way = 0  # pages that were copied and are not yet stored
        self._dirty = np.zeros(0, bool)
        self._change = threading.Condition()
        self._closed = False
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("pages_written", "pages_refused", "pages_dropped", "write_waits"), 0)
        )
        self.thread = threading.Thread(target=self._work, name="plait-outbox", daemon=True)
        self.thread.start()

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
            parcels = self._lift(pages[: len(rows)], rows)
            with self._change:
                self._evicted += parcels
                self._change.notify_all()
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

    def _lift(self, pages: np.ndarray, rows: list[int]) -> list[Parcel]:
        """Copy pages into as many rows; under the store's lock."""
        index = self._cache.index
        self._cache.pool.lift(pages, self._stage.regions, np.array(rows, np.int64))
        keys, ids = index.digests[pages], index.ids[pages]
        with self._change:  # before they count as clean: `flush` must see them as one or the other
            self._under_way += len(rows)
        self._dirty[pages] = False
        return [Parcel(keys[i].tobytes(), ids[i], row) for i, row in enumerate(rows)]

    # -- sending -----------------------------------------------------------------------------

    def _work(self) -> None:
        ready: list[Parcel] = []
        while not self._closed or self._evicted:
            parcels = self._next(wait=not ready)
            for parcel in parcels:
                self._seal(parcel)
            ready += parcels
            if ready and (not parcels or len(ready) >= self._group):
                self._send(ready)
                ready = []
        if ready:
            self._send(ready)

    def _next(self, wait: bool) -> list[Parcel]:
        """Give pages that were evicted, else copy some out; none if there is nothing to do now."""
        with self._change:
            if wait:
                self._change.wait_for(
                    lambda: self._closed or self._evicted or (self._rows and self._dirty.any())
                )
            parcels, self._evicted = self._evicted, []
            if parcels or self._closed:
                return parcels
            rows = sorted(self._rows[-self._batch :])
            del self._rows[-self._batch :]
        with self._lock:
            pages = np.flatnonzero(self._dirty)[: len(rows)].astype(np.int32)
            parcels = self._lift(pages, rows[: len(pages)])
        with self._change:
            self._free(rows[len(pages) :])
            self._change.notify_all()
        return parcels

    def _seal(self, parcel: Parcel) -> None:
        with contextlib.suppress(Exception):  # a codec that refuses a page: so do the tiers
            parcel.data = self._encoding.seal(parcel.key, parcel.ids, self._stage, parcel.row)

    def _send(self, parcels: list[Parcel]) -> None:
        sealed = [(parcel.key, parcel.data) for parcel in parcels if parcel.data is not None]
        keys, pages = [key for key, _ in sealed], [data for _, data in sealed]
        try:
            self._moves.store(keys, pages, then=lambda move: self._stored(parcels, move))
        except TierClosed:
            self._stored(parcels)

    def _stored(self, parcels: list[Parcel], move: Move | None = None) -> None:
        held = 0 if move is None else sum(move.held)
        with self._change:
            self.counts["pages_written"] += held
            self.counts["pages_refused"] += len(parcels) - held
            self._free([parcel.row for parcel in parcels])
            self._under_way -= len(parcels)
            self._change.notify_all()

    # -- the end -----------------------------------------------------------------------------

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all that can be is written down and durable; say whether that was in time."""
        with self._change:
            return self._change.wait_for(
                lambda: self._closed or not (self._dirty.any() or self._under_way), seconds
            )

    def close(self) -> None:
        """End the thread, once what is copied is stored."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self.thread.join()
