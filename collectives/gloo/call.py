"""A call under way over gloo: torch's own work, whose errors say whom it waited for."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty
from threading import Lock
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..work import Promise
from . import deputy

# What gloo says when a connection ended or was waited for in vain; its other errors are about the call itself.
LOST = re.compile(r"gloo/transport|pair closure|imed out|onnection (closed|reset)")
TURN_S = 0.25  # of waiting in C++, where Python sees no signal (Ctrl-C)
TURN_IS_OVER = "Operation timed out!"  # torch, of a wait that ends while the call goes on


class Owner(Protocol):
    """The group of a call."""

    def explain(self, call: Call, error: Exception) -> Exception:
        """Turn what gloo raised into what the person can use."""
        ...

    def forget(self, call: Call) -> None:
        """Take note that a call has ended."""
        ...

    def leave_open(self, call: Call) -> None:
        """Take note that nobody waits for a call any more, which goes on."""
        ...

    def deliver(self, inner: Any) -> None:
        """See to it that a message arrives, for nobody waits for it."""
        ...


class Call(dist.Work):
    """Work of a `GlooGroup`.

    Attributes:
        number: of the call in its group; messages have none.
        peer: the rank of the group that a message is for or from; None for collectives, -1 for "any".
        since: when it began.

    What gloo cannot do is done `last`, by whoever finds first that gloo's part is over; it gives the outputs.
    """

    def __init__(
        self,
        owner: Owner,
        kind: str,
        brought: Sequence[Tensor],
        number: int,
        peer: int | None = None,
        place: str = "",
        last: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.number, self.peer, self.since = number, peer, time.monotonic()
        self._owner, self._kind, self._place = owner, kind, place
        self._count = sum(x.numel() for x in brought)
        self._dtype = brought[0].dtype if brought else None
        self.inner: Any = None
        self._last, self._outputs = last, list[Tensor]()
        self._once = Lock()
        self._said: deputy.Said | None = None  # of the one wait for a message
        self.when_waited_for: Callable[[], None] | None = None  # a trace's; messages have no future

    def __str__(self) -> str:
        if self._dtype is None:
            return self._kind
        return (
            f"{self._kind} of {self._count} {str(self._dtype).removeprefix('torch.')}{self._place}"
        )

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it has ended.

        Raises:
            PeerLost: a rank it needs is gone, or did not come within the group's timeout.
            TimeoutError: it is not done after `timeout`; it goes on.
        """
        limit_s = timeout.total_seconds() if timeout else math.inf  # 0 is how C++ says "no timeout"
        try:
            (self._in_turns if self.peer is None else self._by_deputy)(limit_s)
        except RuntimeError as error:
            raise self._owner.explain(self, error) from error
        except BaseException:
            self._owner.leave_open(self)
            raise
        self._complete()
        self._owner.forget(self)
        if self.when_waited_for is not None:
            self.when_waited_for()
        return True

    def _in_turns(self, limit_s: float) -> None:
        """Wait for a collective, and let Python see signals in between."""
        end = time.monotonic() + limit_s
        while not self._ends_in(min(limit_s, TURN_S)):
            limit_s = end - time.monotonic()
            if limit_s <= 0:
                raise self._late()

    def _ends_in(self, seconds: float) -> bool:
        try:
            return self.inner.wait(timedelta(seconds=max(seconds, 1e-3)))  # 0 would be for ever
        except RuntimeError as error:
            if not str(error).startswith(TURN_IS_OVER):
                raise
        return self.inner.is_completed() and self.inner.wait()

    def _by_deputy(self, limit_s: float) -> None:
        """Wait for a message: gloo closes all connections when a wait for one ends early, so it cannot be in turns."""
        self._said = self._said or deputy.ask(self.inner.wait)
        try:
            error = self._said.get(timeout=None if limit_s == math.inf else limit_s)
        except Empty:
            raise self._late() from None
        self._said.put(error)  # for who waits again
        if error is not None:
            raise error

    def _complete(self) -> None:
        with self._once:
            if self._last is not None:
                self._outputs = self._last()
                self._last = None

    def _late(self) -> TimeoutError:
        return TimeoutError(
            f"{self} is not done after {time.monotonic() - self.since:.3g} s; it goes on"
        )

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        done = self.inner.is_completed()
        if done and self._last is not None:
            with suppress(RuntimeError):  # who waits is told
                self.inner.wait()
                self._complete()
        return done

    def has_failed(self) -> bool:
        """Say of a call that has ended whether that was with an error; torch's own question warns that it goes."""
        try:
            self.inner.wait()
        except RuntimeError:
            return True
        return False

    def is_success(self) -> bool:
        return self.inner.is_success()

    def result(self) -> list[Tensor]:
        return self._outputs or self.inner.result()

    def source_rank(self) -> int:
        return self.inner._source_rank()

    _source_rank = source_rank

    def get_future(self) -> Future:
        """Make a future of the outputs; after a loss it raises what `wait` does, in a RuntimeError."""
        promise = Promise()

        def resolve(inner: Any) -> None:
            try:
                value = inner.value()
            except RuntimeError as error:
                promise.settle(self._owner.explain(self, error))
            else:
                self._complete()
                self._owner.forget(self)
                promise.settle(self._outputs or value)

        self.inner.get_future().add_done_callback(resolve)
        return promise.future


class Sending(Call):
    """Work of a send. Who drops it has still sent: gloo's own would take the message back."""

    def __del__(self) -> None:
        if self.inner is not None and self._said is None:
            self._owner.deliver(self.inner)
