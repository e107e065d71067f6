"""A call under way over gloo: torch's own work, whose errors say whom it waited for."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

# What gloo says when a connection ended or was waited for in vain; its other errors are about the call itself.
LOST = re.compile(r"gloo/transport|pair closure|imed out|onnection (closed|reset)")


class Owner(Protocol):
    """The group of a call."""

    def explain(self, call: Call, error: Exception) -> Exception:
        """Turn what gloo raised into what the person can use."""
        ...

    def forget(self, call: Call) -> None:
        """Take note that a call has ended."""
        ...


class Call(dist.Work):
    """Work of a `GlooGroup`.

    Attributes:
        number: of the call in its group; messages have none.
        peer: the rank of the group that a message is for or from; None for collectives, -1 for "any".
        since: when it began.
    """

    def __init__(
        self,
        owner: Owner,
        kind: str,
        brought: Sequence[Tensor],
        number: int,
        peer: int | None = None,
        place: str = "",
    ) -> None:
        super().__init__()
        self.number, self.peer, self.since = number, peer, time.monotonic()
        self._owner, self._kind, self._place = owner, kind, place
        self._count = sum(x.numel() for x in brought)
        self._dtype = brought[0].dtype if brought else None
        self.inner: Any = None

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
        try:
            self.inner.wait() if timeout is None else self.inner.wait(timeout)
        except RuntimeError as error:
            if timeout is not None and not self.inner.is_completed():
                raise TimeoutError(f"{self} is not done after {timeout}") from None
            raise self._owner.explain(self, error) from error
        self._owner.forget(self)
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self.inner.is_completed()

    def is_success(self) -> bool:
        return self.inner.is_success()

    def result(self) -> list[Tensor]:
        return self.inner.result()

    def source_rank(self) -> int:
        return self.inner._source_rank()

    _source_rank = source_rank

    def get_future(self) -> Future:
        """Make a future of the outputs; a loss is in it as a PeerLost."""
        future: Future = Future()

        def resolve(inner: Any) -> None:
            try:
                value = inner.value()
            except RuntimeError as error:
                future.set_exception(self._owner.explain(self, error))
            else:
                self._owner.forget(self)
                future.set_result(value)

        self.inner.get_future().add_done_callback(resolve)
        return future
