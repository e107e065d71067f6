"""Pages on their way up: a sequence's prefix is read from the tiers while its owner does something else."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

import numpy as np

from .cache import PageCache
from .encoding import PageEncoding
from .errors import PoolExhausted
from .tiers import Move, Moves, TierStack

_LOG = logging.getLogger(__name__)
WINDOW_BYTES = 8 << 20  # read and checked together
WINDOW_PAGES = 64
WINDOWS = 6  # under way: four keep a disk busy while the others are checked


class Fetch:
    """The full pages after a sequence's device prefix, being read.

    Attributes:
        pages: those that arrived, in order; RESERVED until the sequence takes them over.
        over: nothing more may arrive.
        done: nothing more will.
    """

    def __init__(self, keys: list[bytes], ids: np.ndarray, last: int, until: float) -> None:
        self.keys, self.ids, self.last, self.until = keys, ids, last, until
        self.pages = np.empty(0, np.int32)
        self.over = False
        self.done = threading.Event()


class Fetcher:
    """One thread that brings fetches to their end, one after the other.

    Pages are checked in memory of its own; only what is proven enters the pool. A page that is missing, damaged or
    later than `until`, and a pool that has no room, end a fetch early: the prefix is so much shorter.

    State: the store's lock is taken for every window, to write its pages into the pool.
    """

    def __init__(
        self,
        cache: PageCache,
        lock: threading.RLock,
        encoding: PageEncoding,
        stack: TierStack,
        moves: Moves,
        clock: Callable[[], float],
    ) -> None:
        self._cache, self._lock, self._encoding = cache, lock, encoding
        self._stack, self._moves, self._clock = stack, moves, clock
        self._window = min(WINDOW_PAGES, -(-WINDOW_BYTES // encoding.page_bytes))
        self._stage = encoding.staging(WINDOWS * self._window)
        self._queue: deque[Fetch] = deque()
        self._change = threading.Condition()
        self._closed = False
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("fetches", "pages_fetched", "pages_missed", "pages_damaged", "late"), 0)
        )
        self.thread = threading.Thread(target=self._work, name="plait-fetch", daemon=True)
        self.thread.start()

    def begin(self, fetch: Fetch) -> None:
        """Queue a fetch."""
        with self._change:
            if self._closed:
                fetch.done.set()
                return
            self.counts["fetches"] += 1
            self._queue.append(fetch)
            self._change.notify_all()

    def wait(self, fetch: Fetch, seconds: float | None = None) -> bool:
        """Wait until a fetch is done or late; say whether it is one of them."""
        limit = None if seconds is None else self._clock() + seconds
        while not fetch.done.is_set():
            now = self._clock()
            if now >= fetch.until:
                self.counts["late"] += 1
                return True
            if limit is not None and now >= limit:
                return False
            fetch.done.wait(min(fetch.until - now, 1.0 if limit is None else limit - now, 1.0))
        return True

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                fetch = self._queue.popleft()
            try:
                self._carry(fetch)
            # such as an eviction policy that breaks its contract: the others go on
            except Exception:
                _LOG.exception("a fetch ended early")
            finally:
                fetch.done.set()

    def _carry(self, fetch: Fetch) -> None:
        count, first, turn = len(fetch.keys), 0, 0
        loads: deque[tuple[Move, int, int, int]] = deque()
        try:
            while not fetch.over and not self._closed and (loads or first < count):
                while len(loads) < WINDOWS and first < count:
                    stop, base = min(first + self._window, count), turn * self._window
                    left = fetch.until - self._clock()
                    rows = self._stage.rows(base, stop - first)
                    move = self._moves.load(
                        fetch.keys[first:stop], rows, left if left < float("inf") else None
                    )
                    loads.append((move, first, stop, base))
                    first, turn = stop, (turn + 1) % WINDOWS
                if not self._land(fetch, *loads.popleft()):
                    return
        finally:
            for move, *_ in loads:  # the memory is the tier's until they end
                move.cancel()
                _settled(move)

    def _land(self, fetch: Fetch, move: Move, first: int, stop: int, base: int) -> bool:
        """Put the pages of one window into the pool, up to the first that is not right; say if all are."""
        held = _settled(move)
        right = 0
        for at in range(first, stop):
            if not held[at - first]:
                self.counts["pages_missed"] += 1
                break
            if not self._proven(fetch, at, base + at - first):
                break
            right += 1
        with self._lock:
            if fetch.over:
                return False
            room = self._make_room(right, fetch.last)
            self._cache.pool.lay(room, self._stage.regions, np.arange(base, base + len(room)))
            if len(room):
                fetch.pages, fetch.last = np.concatenate([fetch.pages, room]), int(room[-1])
                self.counts["pages_fetched"] += len(room)
        return len(room) == stop - first

    def _proven(self, fetch: Fetch, at: int, row: int) -> bool:
        """Say whether the page in a row is the one that was asked for, or another tier has that one."""
        key, ids = fetch.keys[at], fetch.ids[at]

        def right() -> bool:
            return self._encoding.unseal(key, ids, self._stage, row)

        if right():
            return True
        self.counts["pages_damaged"] += 1
        return self._stack.choose(key, self._stage.bytes[row], right)

    def _make_room(self, count: int, last: int) -> np.ndarray:
        while count > 0:
            try:
                return self._cache.allocate(np.array([count]), np.array([last]))
            except PoolExhausted as full:
                count = min(full.free, count - 1)
        return np.empty(0, np.int32)

    def close(self) -> None:
        """Drop what is queued, and end the thread."""
        with self._change:
            self._closed = True
            for fetch in self._queue:
                fetch.done.set()
            self._queue.clear()
            self._change.notify_all()
        self.thread.join()


def _settled(move: Move) -> list[bool]:
    """Wait for a move to leave its memory alone; give what it held, nothing if it failed."""
    try:
        move.wait()
    except Exception:  # whatever a tier raised is a miss here
        return [False] * len(move.held)
    return move.held
