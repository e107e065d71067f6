"""What a call gives back when it must wait: work that its group still has to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..errors import anew
from ..work import Promise

PATIENCE = 100  # turns of yielding the processor before a waiting kernel returns to Python


def longest_nap(waited: float) -> float:
    """Say how long a wait may sleep at once: a millisecond; a twentieth of long waits, for every look has its cost."""
    return min(1e-2, max(1e-3, waited / 20))


class Driver(Protocol):
    """Who moves pending work on."""

    def drive(self, patience: int) -> bool:
        """Move everything that can move; say whether something did. Fails work whose peers are lost."""
        ...


def _is_done(patience: int) -> bool:
    return True


class Pending(dist.Work):
    """Work of a group; whoever waits for it does it, else the group's own thread.

    Attributes:
        advance: moves it on with some patience; True when it is done.
        peers: the ranks it waits for now, asked when nothing moves.
        since: when its turn came; 0.0 before.
    """

    def __init__(
        self,
        driver: Driver,
        what: str,
        advance: Callable[[int], bool],
        peers: Callable[[], Sequence[int]],
        outputs: Sequence[Tensor] = (),
        alive: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._alive = alive  # what a kernel reads by its address
        self.what, self.advance, self.peers = what, advance, peers
        self.since = 0.0
        self.source = -1
        self._driver = driver
        self._outputs = list(outputs)
        self._ending = threading.Lock()  # between the end and the asking for a future
        self._done = False
        self._error: Exception | None = None
        self._promise: Promise | None = None
        self._asked: Promise | None = None  # the same, while it is not resolved

    def finish(self, error: Exception | None = None) -> None:
        """End it; called once, by whoever drives, who then calls `tell` without a lock."""
        self._error = error
        with self._ending:
            self._done = True
            self._alive = None
            # a receive's advance knows its work: a circle that would keep the tensor until Python looks for circles
            self.advance = _is_done

    def tell(self) -> None:
        """Resolve the future that somebody asked for before the end; what hangs on it may call collectives."""
        with self._ending:
            promise, self._asked = self._asked, None
        if promise is not None:
            self._resolve(promise)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Do the work, or see it done.

        Raises:
            PeerLost: a rank it needs is gone, or did not come within the group's timeout.
            TimeoutError: it is not done after `timeout`; it goes on.
        """
        nap, since = 0.0, time.monotonic()
        end = since + timeout.total_seconds() if timeout else None
        while not self._done:
            moved = self._driver.drive(PATIENCE)
            if not self._done:
                now = time.monotonic()
                if end is not None and now > end:
                    raise TimeoutError(f"{self.what} is not done after {timeout}")
                since = now if moved else since
                nap = 0.0 if moved else min(longest_nap(now - since), nap * 1.3 + 1e-5)
                time.sleep(nap)
        if self._error is not None:
            raise anew(self._error)
        return True

    def is_completed(self) -> bool:
        if not self._done:
            self._driver.drive(0)
        return self._done

    def is_success(self) -> bool:
        return self._done and self._error is None

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> list[Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return self.source

    _source_rank = source_rank

    def get_future(self) -> Future:
        """Make a future of the outputs; the group's own thread resolves it if nobody waits."""
        with self._ending:
            fresh, done = self._promise is None, self._done
            promise = self._promise = self._promise or Promise()
            if fresh and not done:
                self._asked = promise
        if fresh and done:
            self._resolve(promise)
        return promise.future

    def _resolve(self, promise: Promise) -> None:
        promise.settle(self._outputs if self._error is None else self._error)
