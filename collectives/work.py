"""Work handles that every backend written in Python gives back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future, collect_all

from .errors import anew


class Promise:
    """A future that fails as those of C++ do: whoever reads it meets the error, in C++ too.

    `Future.set_exception` makes only Python raise. In C++ the exception is the future's value: DDP's backward looks for
    tensors in it, finds none, and reads the first: the process ends (SIGSEGV, torch 2.13).
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._outcome: Future[Any] = Future(devices=list(devices))
        self.future: Future[Any] = self._outcome.then(_value_of)

    def settle(self, outcome: Any) -> None:
        """Set the future to a value, or to an exception."""
        self._outcome.set_result(outcome)


def _value_of(outcome: Future[Any]) -> Any:
    value = outcome.value()
    if isinstance(value, Exception):
        raise anew(value)
    return value


class Finished(dist.Work):
    """Work that was done before the call returned."""

    def __init__(self, outputs: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._outputs = list(outputs)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        return None

    def get_future(self) -> Future:
        future: Future = Future()
        future.set_result(self._outputs)
        return future


class Several(dist.Work):
    """Several works as one."""

    def __init__(self, works: Sequence[Any], outputs: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._works, self._outputs = list(works), list(outputs)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for all of them, no longer than `timeout` together."""
        end = time.monotonic() + timeout.total_seconds() if timeout else None
        for work in self._works:
            if end is None:
                work.wait()
            else:  # 0 would be for ever
                work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def result(self) -> list[Tensor]:
        return self._outputs

    def get_future(self) -> Future:
        whole = collect_all([work.get_future() for work in self._works])
        return whole.then(lambda done: [f.value() for f in done.value()] and self._outputs)
