"""The pending work of one group, and the thread that does it when nobody waits."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from ..errors import PeerLost, anew
from .members import Members
from .work import Pending

STOPPED_S = 30.0  # a process that is stopped (SIGSTOP) is given up after this, whatever the timeout
REST_S = 1e-3  # the thread looks at idle peers this often


class Progress:
    """Lines of work; within a line one at a time, in order.

    Collectives are one line, so all ranks do them in the order they were called. What is sent to one rank is
    another line each, and each receive a line of its own: nothing there waits for a collective.

    State: `lock` is held by whoever moves work or starts a call; nobody holds it while asleep.
    """

    def __init__(self, members: Members, timeout_s: float) -> None:
        self.members, self.timeout_s = members, timeout_s
        self.lock = threading.Lock()
        self.collectives: deque[Pending] = deque()
        self.lines: list[deque[Pending]] = [self.collectives]
        self.broken: Exception | None = None
        self._ended: deque[Pending] = deque()  # whose futures are not resolved yet
        self._awake = threading.Event()
        self.closed = False
        self._thread: threading.Thread | None = None

    def add(self, line: deque[Pending], work: Pending) -> Pending:
        """Put work at the end of a line; the caller holds the lock."""
        if not any(line is known for known in self.lines):
            self.lines.append(line)
        line.append(work)
        return work

    def check_open(self) -> None:
        """Refuse messages of a group that is closed; collectives look at `broken`."""
        if self.closed and self.broken is not None:
            raise anew(self.broken)

    def wake(self) -> None:
        """Have the thread do what is pending while the caller does other things."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_attend, args=(weakref.ref(self), self._awake), name="plait-shm", daemon=True
            )
            self._thread.start()
        self._awake.set()

    def drive(self, patience: int) -> bool:
        """Move what can move; fail what cannot any more."""
        with self.lock:
            moved = self._move(patience)
            if not moved:
                self._watch()
        self._tell()
        return moved

    def _tell(self) -> None:
        """Resolve futures, without the lock: their callbacks may call collectives."""
        with suppress(IndexError):  # another thread told the last one
            while self._ended:
                self._ended.popleft().tell()

    def _move(self, patience: int) -> bool:
        moved = False
        for line in list(self.lines):
            while line and self._step(line, line[0], patience):
                moved = True
            if not line and line is not self.collectives:
                self.lines = [known for known in self.lines if known is not line]
        return moved

    def _step(self, line: deque[Pending], work: Pending, patience: int) -> bool:
        """Advance the first work of a line; say whether it left the line."""
        try:
            if not work.advance(patience):
                work.since = work.since or time.monotonic()
                return False
            self._end_first(line)
        except Exception as error:  # whoever waits for the work gets it
            self.fail(line, error)
        return True

    def fail(self, line: deque[Pending], error: Exception) -> None:
        """End the first work of a line with an error; a broken collective ends all that follow."""
        if line is self.collectives:
            self.broken = error
            peers = line[0].peers() if isinstance(error, PeerLost) else []
            self.members.note_failure(peers[0] if peers else None)
            while line:
                self._end_first(line, error)
        else:
            self._end_first(line, error)

    def _end_first(self, line: deque[Pending], error: Exception | None = None) -> None:
        work = line.popleft()
        work.finish(error)
        self._ended.append(work)

    def _watch(self) -> None:
        """Look after the peers of work that does not move."""
        for line in list(self.lines):
            if not line:
                continue
            lost = self._lost(line[0])
            if lost and not self._step(line, line[0], 1):  # it may have given all before it went
                self.fail(line, lost)

    def _lost(self, work: Pending) -> PeerLost | None:
        """Say whom work waits for in vain: all of its peers are gone, or its time is over."""
        members = self.members
        peers = [rank for rank in work.peers() if rank != members.rank]
        gone = [why for rank in peers if (why := members.lost(rank))]
        if gone and len(gone) == len(peers):
            return PeerLost(self._say(work, gone))
        waited = time.monotonic() - work.since if work.since else 0.0
        limit = self.timeout_s
        if limit > STOPPED_S < waited and all(members.stopped(rank) for rank in peers):
            limit = STOPPED_S
        if waited > limit:
            reasons = [members.slow(rank) for rank in peers] or ["this rank sent itself nothing"]
            return PeerLost(self._say(work, reasons) + f" within {limit:g} s")
        return None

    def _say(self, work: Pending, reasons: Iterable[str]) -> str:
        return f"{work.what} in group {self.members.name}: {'; '.join(reasons)}"

    def rest(self, events: threading.Event) -> float | None:
        """One turn of the thread: seconds to sleep, or None when it should end."""
        if self.closed:
            return None
        events.clear()
        moved = self.drive(0)
        if any(self.lines):
            events.set()
        return 0.0 if moved else REST_S

    def close(self) -> None:
        """End what is pending, and the thread."""
        with self.lock:
            if not self.closed:
                self._end(RuntimeError(f"group {self.members.name} is closed"))
        self._tell()
        self._awake.set()

    def orphan(self, error: RuntimeError) -> None:
        """End everything in a fork of the rank's process, which has no thread, and perhaps a lock that it held."""
        self.lock = threading.Lock()
        self._end(error)

    def _end(self, error: RuntimeError) -> None:
        self.closed, self.broken = True, error
        for line in self.lines:
            while line:
                self._end_first(line, error)


def _attend(of: weakref.ref[Progress], awake: threading.Event) -> None:
    """Attend a group until it closes or is forgotten."""
    nap = 1e-5
    while True:
        awake.wait()
        progress = of()
        if progress is None or (rest := progress.rest(awake)) is None:
            return
        del progress
        nap = 1e-5 if rest == 0.0 else min(rest, 1.5 * nap)
        time.sleep(nap)
