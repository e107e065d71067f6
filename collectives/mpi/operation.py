"""One operation under way: whoever has time moves it on, whoever needs it waits for it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from ..errors import anew
from ..work import Promise
from . import failure
from .peers import Steps, complete

if TYPE_CHECKING:
    from .member import Member

About = tuple[str, torch.Size | None, torch.dtype | None]

# A waiter polls without sleeping as long as the transfer itself may take: MPI moves data inside the polls.
BUSY_S = 1e-3
SLOW_BYTES_PER_S = 0.5e9
NAP_S = 50e-6
STOPPED_S = 30.0  # a rank that then does not answer the roll call is given up, whatever the timeout


class Operation:
    """Drives the steps of one collective or message.

    `poll` never blocks and may be called from any thread; `wait` polls to the end and raises what
    went wrong. Both do all MPI work in the calling thread, so that a blocking call needs no other.

    State: the MPI requests under way. Dropped at the end, with the tensors.
    """

    def __init__(
        self,
        group: Member,
        about: About,
        tensors: list[Tensor],
        steps: Steps,
        peer: int | None = None,
    ) -> None:
        self.group = group
        self.about = about
        self.peer = peer  # rank in the group, for a message; None for a collective
        self.call = group.calls
        self.done = False
        self.error: Exception | None = None
        self.source = -1  # who sent a message that might come from anyone
        self.started = 0.0
        self._tensors = tensors
        self._steps: Steps | None = steps
        self._requests: Any = ()
        self._promise: Promise | None = None
        self._asked: Promise | None = None  # the same, while it is not resolved
        self._lock = Lock()

    def start(self) -> None:
        """Take the first step."""
        try:
            self._advance()
        except Exception as error:
            raise self.group.engine.explain(self, error) from error

    def resume(self, requests: Any) -> None:
        """Take over steps that somebody else has driven up to these requests; None: what they wait for is not known."""
        self._requests = requests

    def interrupted(self, by: KeyboardInterrupt) -> None:
        """Take note of Ctrl-C: what can go on does, for others wait for it.

        Between two steps there is nothing that could: the requests have no name any more, but MPI may still write where
        they say. Then this is the end of the operation, and of the group.
        """
        if self.done or self._requests is not None:
            return
        self.group.engine.abandoned.append((self.remains(), by))
        self._end(RuntimeError(f"{self.group} is closed: {self} was interrupted"))
        self.group.lost = self.group.lost or self.error

    def __str__(self) -> str:
        if self.peer is None:
            return failure.text(*self.about)
        peer = "any rank" if self.peer < 0 else f"rank {self.group.ranks[self.peer]}"
        return f"{failure.text(*self.about)}, peer {peer}"

    def poll(self) -> bool:
        """Move on as far as possible without waiting; say whether it has ended."""
        if self.done or not self._lock.acquire(blocking=False):
            return self.done
        try:
            self._move()
        finally:
            self._lock.release()
            self._tell()
        return self.done

    def _move(self) -> None:
        try:
            while not self.done and self._arrived():
                self._advance()
        except Exception as error:
            self._end(self.group.engine.explain(self, error))
        except KeyboardInterrupt as interruption:
            self.interrupted(interruption)
            raise

    def _arrived(self) -> bool:
        requests = self._requests
        with self.group.engine.turn:
            if self.peer is None or self.peer >= 0:
                return complete(requests)
            status = MPI.Status()
            if arrived := requests.Test(status):
                self.source = status.source
            return arrived

    def _advance(self) -> None:
        assert self._steps is not None
        with self.group.engine.turn:
            self._requests = None  # an interruption may come before the next ones have this name
            self._requests = next(self._steps, None)
        if self._requests is None:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        self.error, self._steps, self._requests = error, None, ()
        self.done = True

    def _tell(self) -> None:
        """Resolve the future after the end, without the lock: what hangs on it may ask for it again."""
        if self.done and self._asked is not None:
            with self._lock:
                promise, self._asked = self._asked, None
            if promise is not None:
                self._settle(promise)

    def fail(self, error: Exception) -> bool:
        """End with an error, unless it has ended: a peer is lost and what is under way will never arrive."""
        with self._lock:
            if self.done:
                return False
            self.group.engine.abandoned.append(self.remains())
            self._end(error)
        self._tell()
        return True

    def remains(self) -> tuple[Any, ...]:
        """Give what must outlive an operation that failed: MPI may still write there."""
        return self._tensors, self._steps, self._requests

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when it has ended.

        Raises:
            PeerLost: a rank did not come within the group's timeout; names it.
            TimeoutError: it is not done after `timeout_s`; it goes on.
        """
        patience = self.group.timeout_s
        start = time.monotonic()
        busy_until = start + BUSY_S + sum(t.nbytes for t in self._tensors) / SLOW_BYTES_PER_S
        look = start + STOPPED_S
        while not self.poll():
            now = time.monotonic()
            if timeout_s is not None and now > start + timeout_s:
                raise TimeoutError(f"{self} is not done after {timeout_s:g} s")
            if now < busy_until:
                os.sched_yield()
                continue
            time.sleep(NAP_S)
            late = now > start + patience
            if not late and now > look:
                late, look = self.group.engine.misses_someone(self), time.monotonic() + STOPPED_S
            if late or self.group.engine.rollcall.left:
                self.group.engine.give_up(self, late, min(patience, now - start))
        if self.error is not None:
            raise anew(self.error)

    def future(self) -> torch.futures.Future:
        """Make the future, which whoever completes the operation sets."""
        with self._lock:
            if self._promise is None:
                devices = {t.device for t in self._tensors if t.is_cuda}
                self._promise = self._asked = Promise(sorted(devices, key=str))
            promise = self._promise
        self._tell()
        return promise.future

    def _settle(self, promise: Promise) -> None:
        promise.settle(self._tensors if self.error is None else self.error)

    def result(self) -> list[Tensor]:
        return self._tensors


class OperationWork(dist.Work):
    """The c10d face of an operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def wait(self, timeout: timedelta | None = None) -> bool:
        seconds = None if timeout is None or timeout <= timedelta(0) else timeout.total_seconds()
        self.operation.wait(seconds)
        return True

    def synchronize(self) -> None:
        self.operation.wait()

    def is_completed(self) -> bool:
        return self.operation.poll()

    def is_success(self) -> bool:
        return self.operation.poll() and self.operation.error is None

    def exception(self) -> Exception | None:
        return self.operation.error

    def result(self) -> list[Tensor]:
        return self.operation.result()

    def get_future(self) -> torch.futures.Future:
        return self.operation.future()

    def source_rank(self) -> int:
        return self.operation.source

    _source_rank = source_rank
