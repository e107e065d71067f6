"""Moves of pages between the caller's memory and a tier, behind the caller's back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from .choice import Meter
from .errors import TierClosed
from .tier import Page, Tier, byte_views

CHUNK_BYTES = 2 << 20  # what a thread does before it looks whether the move is still wanted
QUEUE_BYTES = 1 << 30


class Move:
    """A batch under way. Its pages' memory is the tier's until `wait` says True.

    Attributes:
        held: per page: for a store whether it is durable now, for a load whether it was read.
    """

    def __init__(
        self, keys: Sequence[bytes], views: list[np.ndarray], store: bool, until: float
    ) -> None:
        self.keys, self.views, self.store, self.until = list(keys), views, store, until
        self.held = [False] * len(views)
        self._left = len(views)
        self._wanted = True
        self._error: BaseException | None = None
        self._done = threading.Event()

    def cancel(self) -> None:
        """Begin no more of it. What has begun still ends: wait before using the memory."""
        self._wanted = False

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way any more, without waiting."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing of it is under way; say whether that is so.

        Raises:
            Exception: what went wrong in the tier, such as a commit that failed.
        """
        done = self._done.wait(timeout)
        if done and self._error is not None:
            raise self._error
        return done


class Moves:
    """A few threads that store to and load from one tier.

    Loads go before stores, each in the order given. A store is committed as a whole, and moves that end together
    share a commit. Memory is bounded: nothing is copied but through the tier's own staging, and at most
    `queue_bytes` of the caller's pages wait; who brings more waits for room.

    Args:
        threads: transfers at a time; four keep a disk busy.
        clock: the time that deadlines are in.
    """

    def __init__(
        self,
        tier: Tier,
        threads: int = 4,
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if threads < 1 or queue_bytes < 1:
            raise ValueError(
                f"Moves needs threads and queue_bytes, got {threads} and {queue_bytes}"
            )
        self._tier, self._limit, self._clock = tier, queue_bytes, clock
        self.loading, self.storing = Meter(), Meter()
        self._loads: deque[tuple[Move, range]] = deque()
        self._stores: deque[tuple[Move, range]] = deque()
        self._change = threading.Condition()
        self._queued_bytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"plait-moves-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def store(
        self, keys: Sequence[bytes], pages: Sequence[Page], seconds: float | None = None
    ) -> Move:
        """Put pages and commit them.

        Args:
            seconds: begin nothing later than this from now; the rest counts as cancelled.
        """
        return self._submit(Move(keys, byte_views(keys, pages), True, self._until(seconds)))

    def load(
        self, keys: Sequence[bytes], out: Sequence[Page], seconds: float | None = None
    ) -> Move:
        """Get pages into the caller's memory; a miss is a page that is not `held`."""
        views = byte_views(keys, out, writable=True)
        return self._submit(Move(keys, views, False, self._until(seconds)))

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are queued or under way."""
        return self._queued_bytes

    def _until(self, seconds: float | None) -> float:
        return float("inf") if seconds is None else self._clock() + seconds

    def _submit(self, move: Move) -> Move:
        size = sum(view.size for view in move.views)
        with self._change:
            while self._queued_bytes and self._queued_bytes + size > self._limit:
                left = move.until - self._clock()
                if self._closed or left <= 0:
                    break
                self._change.wait(min(left, 1.0))
            if self._closed:
                raise TierClosed("these Moves are closed; make new ones")
            if not move.views or move.until <= self._clock():
                move._done.set()
                return move
            self._queued_bytes += size
            queue = self._stores if move.store else self._loads
            queue.extend((move, chunk) for chunk in _chunks(move.views))
            self._change.notify_all()
        return move

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._loads or self._stores or self._closed)
                if not self._loads and not self._stores:
                    return
                move, chunk = (self._loads or self._stores).popleft()
            try:
                self._do(move, chunk)
            except BaseException as error:
                move._error, move._wanted = error, False
            self._finish(move, chunk)

    def _do(self, move: Move, chunk: range) -> None:
        if not move._wanted or self._clock() > move.until:
            return
        keys, views = move.keys[chunk.start : chunk.stop], move.views[chunk.start : chunk.stop]
        meter = self.storing if move.store else self.loading
        with meter.running() as moved:
            if move.store:
                held = self._tier.put(keys, views)
            else:
                held = [length is not None for length in self._tier.get(keys, views)]
            moved(sum(view.size for view, yes in zip(views, held, strict=True) if yes))
        move.held[chunk.start : chunk.stop] = held

    def _finish(self, move: Move, chunk: range) -> None:
        with self._change:
            move._left -= len(chunk)
            last = not move._left
            self._queued_bytes -= sum(move.views[i].size for i in chunk)
            self._change.notify_all()
        if not last:
            return
        try:
            if move.store and any(move.held):
                self._tier.commit()
        except BaseException as error:
            move._error = error
        if move.store and any(
            move.held
        ):  # another move's commit may have failed with our pages in it
            with_error = move._error is not None
            held = [False] * len(move.held) if with_error else self._tier.contains(move.keys)
            move.held = [a and b for a, b in zip(move.held, held, strict=True)]
        move._done.set()

    def close(self) -> None:
        """Finish what is queued, and end the threads. The tier stays open."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _chunks(views: list[np.ndarray]) -> list[range]:
    """Cut a batch into pieces of about `CHUNK_BYTES`, at least a page each."""
    chunks, begin, size = [], 0, 0
    for i, view in enumerate(views):
        if size and size + view.size > CHUNK_BYTES:
            chunks.append(range(begin, i))
            begin, size = i, 0
        size += view.size
    return [*chunks, range(begin, len(views))]
