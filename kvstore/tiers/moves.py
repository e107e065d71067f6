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

CHUNK_BYTES = 8 << 20  # what a thread does before it looks whether the move is still wanted
QUEUE_BYTES = 1 << 30
COMMIT_BYTES = 32 << 20  # a sync waits for the writes under way: fewer is faster


class Move:
    """A batch under way. Its pages' memory is the tier's until `wait` says True.

    Attributes:
        held: per page: for a store whether it is durable now, for a load whether it was read.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        views: list[np.ndarray],
        store: bool,
        until: float,
        then: Callable[[Move], None] | None = None,
    ) -> None:
        self.keys, self.views, self.store, self.until = list(keys), views, store, until
        self._then = then
        self.held = [False] * len(views)
        self._left = len(views)
        self._wanted = True
        self._error: BaseException | None = None
        self._done = threading.Event()

    def cancel(self) -> None:
        """Begin no more of it. What has begun still ends: wait before using the memory."""
        self._wanted = False

    def _end(self) -> None:
        self._done.set()
        if self._then is not None:
            self._then(self)

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
    """A few threads that store to and load from one tier, and one that commits.

    Loads go before stores, each in the order given. A store is committed as a whole: when no other one is under way,
    or with those that ended before once they are many bytes; no transfer waits for a commit. Memory is bounded:
    nothing is copied but through the tier's own staging, and at most `queue_bytes` of the caller's pages wait; who
    brings more waits for room.

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
        self._written: list[Move] = []  # to be committed
        self._storing = 0  # chunks of stores that are queued or under way
        self._change = threading.Condition()
        self._queued_bytes = 0
        self._closed = self._idle = False
        self._threads = [
            threading.Thread(target=self._work, name=f"plait-moves-{i}", daemon=True)
            for i in range(threads)
        ]
        self._committer = threading.Thread(
            target=self._commit, name="plait-moves-commit", daemon=True
        )
        for thread in self.threads:
            thread.start()

    def store(
        self,
        keys: Sequence[bytes],
        pages: Sequence[Page],
        seconds: float | None = None,
        then: Callable[[Move], None] | None = None,
    ) -> Move:
        """Put pages and commit them.

        Args:
            seconds: begin nothing later than this from now; the rest counts as cancelled.
            then: called with the move when nothing of it is under way any more, in a thread of ours or in this one.
        """
        return self._submit(Move(keys, byte_views(keys, pages), True, self._until(seconds), then))

    def load(
        self, keys: Sequence[bytes], out: Sequence[Page], seconds: float | None = None
    ) -> Move:
        """Get pages into the caller's memory; a miss is a page that is not `held`."""
        views = byte_views(keys, out, writable=True)
        return self._submit(Move(keys, views, False, self._until(seconds)))

    @property
    def threads(self) -> list[threading.Thread]:
        """Those that work behind the caller's back."""
        return [*self._threads, self._committer]

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
            if move.views and move.until > self._clock():
                self._queued_bytes += size
                chunks = [(move, chunk) for chunk in _chunks(move.views)]
                (self._stores if move.store else self._loads).extend(chunks)
                self._storing += len(chunks) if move.store else 0
                self._change.notify_all()
                return move
        move._end()
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
            self._storing -= move.store
            last = not move._left
            commit = last and move.store and any(move.held)
            if commit:
                self._written.append(move)
            self._queued_bytes -= sum(move.views[i].size for i in chunk)
            self._change.notify_all()
        if last and not commit:
            move._end()

    def _commit(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(self._to_commit)
                moves, self._written = self._written, []
            if not moves:
                return
            error = None
            try:
                self._tier.commit()
            except BaseException as raised:
                error = raised
            for move in moves:
                self._settle(move, error)

    def _to_commit(self) -> bool:
        if not self._written:
            return self._idle
        size = sum(view.size for move in self._written for view in move.views)
        return not self._storing or size >= COMMIT_BYTES

    def _settle(self, move: Move, error: BaseException | None) -> None:
        """End a move whose pages were committed, or not."""
        try:
            move._error = error or move._error
            durable = [False] * len(move.held)
            if move._error is None:  # another move's commit may have failed with our pages in it
                durable = self._tier.contains(move.keys)
            move.held = [a and b for a, b in zip(move.held, durable, strict=True)]
        except BaseException as raised:
            move._error, move.held = raised, [False] * len(move.held)
        move._end()

    def close(self) -> None:
        """Finish what is queued, and end the threads. The tier stays open."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        with self._change:
            self._idle = True
            self._change.notify_all()
        self._committer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _chunks(views: list[np.ndarray]) -> list[range]:
    """Cut a batch into pieces of about `CHUNK_BYTES`, at least a page each."""
    chunks, begin, size = [], 0, 0
    for i, view in enumerate(views):
        if size and size + view.size // 2 > CHUNK_BYTES:
            chunks.append(range(begin, i))
            begin, size = i, 0
        size += view.size
    return [*chunks, range(begin, len(views))]
