"""Calls written down at the places of their tensors: what comes again is looked up, not made again.

Their kernels find in memory what others are passed as arrays, and are called by address: 2 us less than the general
way. A call is found by everything that it depends on: operation and operator, addresses, shapes and dtypes; strides are
looked at each time, and whether a tensor is marked as negated. What does not suit (views, complex numbers, tensors that
do not fit) goes the general way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ...cuda_kernels.kernel_cache import entry
from ..sendable import wraps
from ..trace import listening
from .all_reduce import all_reduce_dense
from .calls import KIND, code_of, dense_view, reduction
from .exchange import exchange_evenly
from .reduce_scatter import reduce_scatter_evenly
from .steps import DONE
from .tables import even_starts, even_table
from .work import PATIENCE

if TYPE_CHECKING:
    from .engine import Engine

MOST = 4096  # calls that a group remembers


class NotedCall(NamedTuple):
    """A call of dense tensors, or (the fused norm's) what calls of one form share.

    Attributes:
        kernel: takes the addresses of the group's state and of the words, then what the words leave open, the code, and
            how long it may wait.
        at: where the words stand.
        count: elements, as errors say them.
        tables: of an exchange, what is sent to each rank, and what is expected of each: first element and number.
    """

    kernel: Callable[..., int]
    at: int
    code: int
    count: int
    words: Any
    tables: Any = None

    def __call__(self, state: Any, *arguments: int) -> int:
        """Run as the kernels do whose arguments are arrays."""
        return self.kernel(state.ctypes.data, self.at, *arguments)


class Noted:
    """The short way of an engine's calls; each gives None, with nothing done, where tensors do not suit it.

    State: the calls, which the engine keeps, for it forgets them when it takes symmetric memory.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._calls = engine, engine.noted
        self._state_at = engine.state.ctypes.data

    def runs(
        self, kind: str, output: Tensor, input: Tensor, wait: bool, op: Any = None
    ) -> dist.Work | None:
        """Move equal runs, or reduce them by an operator."""
        try:
            places = output.data_ptr(), input.data_ptr()
        except RuntimeError:  # they have no memory of their own
            return None
        # of the operator its number: to look at it otherwise costs more
        key = kind, hash(op), places, output.shape, input.shape, output.dtype, input.dtype
        try:
            call = self._calls[key]
        except KeyError:
            call = self._note(key, places, output, even_call(self._engine, kind, output, input, op))
        if call is None or output.is_neg() or input.is_neg():
            return None
        if not (output.is_contiguous() and input.is_contiguous()):
            return None
        return self._do(call, output, input, wait)

    def all_reduce(self, x: Tensor, op: Any, wait: bool) -> dist.Work | None:
        """Reduce in place, on all ranks."""
        try:
            place = x.data_ptr()
        except RuntimeError:
            return None
        key = hash(op), place, x.shape, x.dtype
        try:
            call = self._calls[key]
        except KeyError:
            call = self._note(key, (place,), x, dense_reduction(self._engine, x, op))
        if call is None or x.is_neg() or not x.is_contiguous():
            return None
        return self._do(call, x, x, wait)

    def _note(
        self, key: Any, places: tuple[int, ...], output: Tensor, call: NotedCall | None
    ) -> NotedCall | None:
        if len(self._calls) >= MOST:
            self._calls.clear()
        if all(places) and output.is_cpu:  # tensors without memory, on any device, are at 0
            self._calls[key] = call
        return call

    def _do(self, call: NotedCall, output: Tensor, input: Tensor, wait: bool) -> dist.Work:
        engine, (kernel, at, code, count, _, _) = self._engine, call
        progress, work = engine.progress, None
        # most calls: what `run` does, in less time
        if wait and not engine.shows_calls and not listening():
            with progress.lock:
                if not progress.collectives and progress.broken is None:
                    if kernel(self._state_at, at, code, PATIENCE) == DONE:
                        return engine.finished
                    work = engine.pend(call, (), code, count, [output], [input])
        if work is None:
            return engine.run(call, (), code, count, [output], wait, [input])
        work.wait()
        return work


def even_call(
    engine: Engine, kind: str, output: Tensor, input: Tensor, op: Any
) -> NotedCall | None:
    """Write down a call of equal runs."""
    if op is None:
        return even_exchange(engine, kind, output, input)
    return even_reduction(engine, output, input, op)


def even_exchange(engine: Engine, kind: str, output: Tensor, input: Tensor) -> NotedCall | None:
    """Write down what `exchange_evenly` takes."""
    ranks, shared = engine.members.ranks, kind == "all_gather"
    into, shape, dtype = output.shape, input.shape, output.dtype
    count = shape.numel()
    step = count if shared else count // ranks
    whole = shape[:1].numel() % ranks == 0 and into[:1].numel() % ranks == 0
    fits = into.numel() == ranks * step and (shared or whole)
    if not fits or not _plain(output, input):
        return None
    received = even_table(ranks, step, step)
    table = even_table(ranks, count, 0) if shared else received
    shown = (shared, dtype.itemsize), *_views(input, output), table.ravel(), received.ravel()
    words = np.concatenate(shown)
    code = code_of(KIND[kind], dtype)
    return NotedCall(
        entry(exchange_evenly), words.ctypes.data, code, count, words, (table, received)
    )


def even_reduction(engine: Engine, output: Tensor, input: Tensor, op: Any) -> NotedCall | None:
    """Write down what `reduce_scatter_evenly` takes."""
    ranks, count, dtype = engine.members.ranks, output.numel(), output.dtype
    fits = ranks > 1 and input.numel() == ranks * count
    if not fits or not _plain(output, input):
        return None
    function, number, code = reduction("reduce_scatter", dtype, op)
    shown = (function, count, number), *_views(input, output), even_starts(ranks, count)
    words = np.concatenate(shown)
    return NotedCall(entry(reduce_scatter_evenly), words.ctypes.data, code, count, words)


def dense_reduction(engine: Engine, x: Tensor, op: Any) -> NotedCall | None:
    """Write down what `all_reduce_dense` takes."""
    if engine.members.ranks == 1 or not _plain(x) or engine.symmetric.place_of(x) is not None:
        return None
    function, number, code = reduction("all_reduce", x.dtype, op)
    count = x.numel()
    words = np.concatenate([(function, count, number), *_views(x)])
    return NotedCall(entry(all_reduce_dense), words.ctypes.data, code, count, words)


def _plain(*tensors: Tensor) -> bool:
    """Say whether tensors have memory of the CPU, and one dtype."""
    dtype = tensors[0].dtype
    same = all(x.is_cpu and x.dtype == dtype and not wraps(x) for x in tensors)
    return same and not dtype.is_complex


def _views(*tensors: Tensor) -> list[Any]:
    return [dense_view(x.data_ptr(), x.itemsize) for x in tensors]
