"""A record of every collective that torch's dispatcher sees: operation, axis, shape, bytes, seconds from when to when.

`timeline.py` makes files and pictures of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .dispatched import kernel_of_c10d, read


@dataclass(frozen=True)
class Event:
    """One collective as one rank saw it.

    ``sent_bytes`` is what this rank puts on the wire (ring algorithms). ``start`` is of ``time.perf_counter``, which is
    one clock for all processes of a host; ``seconds`` last until the collective was complete, also where its caller
    went on meanwhile. (On CUDA devices both are the host's, which only queues.)
    """

    op: str
    axis: str
    ranks: int
    shape: tuple[int, ...]
    dtype: str
    payload_bytes: int
    sent_bytes: int
    seconds: float
    scope: str = ""
    start: float = field(default=0.0, compare=False)

    @property
    def end(self) -> float:
        """When it was complete."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Span:
    """Something this rank computed, by name; see ``span``."""

    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """When it was done."""
        return self.start + self.seconds


@dataclass
class Trace(TorchDispatchMode):
    """Record the collectives issued inside ``with Trace(axis_of) as trace``.

    ``axis_of`` names a process group (``Groups.axis_of``); without it the axis is ``"group of n"``. Counting rests on
    torch's own dispatcher, so a collective issued by any library is seen, forward and backward.
    """

    axis_of: Callable[[dist.ProcessGroup], str] | None = None
    events: list[Event] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    scope: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor turns it into what its ranks compute and send, which comes here again
        kwargs = kwargs or {}
        if (kernel := kernel_of_c10d(func, args)) is not None:
            with self:  # which sees what it calls
                return kernel(*args, **kwargs)
        start = time.perf_counter()
        result = func(*args, **kwargs)
        call = read(func, args, kwargs, result)
        if call is not None:
            work = call.work
            if work is not None and call.waits:
                work.wait()  # as the caller does next
                work = None
            seconds = time.perf_counter() - start
            self.note(call.group, call.op, call.brought, seconds, work, call.kept, call.root)
        return result

    def note(
        self,
        group: dist.ProcessGroup | None,
        op: str,
        brought: Sequence[Tensor],
        seconds: float,
        work: dist.Work | None = None,
        kept: float | None = None,
        root: int | None = None,
    ) -> None:
        """Record a call that took so long until now, with the tensors that this rank brought to it.

        ``work`` is given where the call returned before it was complete; its end is recorded when it comes. ``kept`` is
        the share of an exchange that stays on this rank, where the parts are not even. ``root`` is the group's rank
        that the others send to, or that sends to them.
        """
        start = time.perf_counter() - seconds
        ranks = group.size() if group is not None else 1
        axis = self.axis_of(group) if self.axis_of and group is not None else f"group of {ranks}"
        shape, dtype = (tuple(brought[0].shape), brought[0].dtype) if brought else ((), "")
        payload = sum(x.numel() * x.element_size() for x in brought)
        name, sent = str(dtype).removeprefix("torch."), wire_bytes(op, payload, ranks)
        if kept is not None:
            sent = round(payload * (1 - kept))
        elif root is not None and group is not None:
            sent = rooted_bytes(op, payload, ranks, (group.rank() - root) % ranks)
        self.events.append(
            Event(op, axis, ranks, shape, name, payload, sent, seconds, self.scope, start)
        )
        if work is not None:
            self._time(work, len(self.events) - 1)

    def _time(self, work: dist.Work, number: int) -> None:
        """Correct an event's seconds when its work is complete, if nobody has taken it from the list meanwhile."""
        event = self.events[number]

        def complete(_: Any = None) -> None:
            if number < len(self.events) and self.events[number] is event:
                self.events[number] = replace(event, seconds=time.perf_counter() - event.start)

        try:
            work.get_future().add_done_callback(complete)
        except (RuntimeError, NotImplementedError):
            # gloo's messages have none; ours tell who waited for them
            ours: Any = work
            if hasattr(ours, "when_waited_for"):
                ours.when_waited_for = complete

    def counts(self) -> Counter[tuple[str, str]]:
        """Count the events by (op, axis)."""
        return Counter((e.op, e.axis) for e in self.events)

    def sent_bytes(self) -> int:
        """Sum what this rank sent."""
        return sum(e.sent_bytes for e in self.events)


def listening() -> bool:
    """Say whether anything listens; this costs next to nothing."""
    return _len_torch_dispatch_stack() > 0


def tell_traces(
    group: dist.ProcessGroup,
    op: str,
    brought: Sequence[Tensor],
    seconds: float,
    work: dist.Work | None = None,
    kept: float | None = None,
    root: int | None = None,
) -> None:
    """Record a call in every Trace that is on: for groups written in Python, which the dispatcher does not see.

    ``work`` is given where the call returned before it was complete, ``kept`` for exchanges, ``root`` where there is
    one, as in `Trace.note`.
    """
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Trace):
            mode.note(group, op, brought, seconds, work, kept, root)


def span(name: str) -> AbstractContextManager[None]:
    """Record under a name what is computed inside, in every Trace that is on."""
    return _span(name) if listening() else nullcontext()


@contextmanager
def _span(name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Trace):
                mode.spans.append(Span(name, start, seconds))


def wire_bytes(op: str, payload: int, n: int) -> int:
    """Bytes one rank sends: ring all-reduce 2(n-1)/n, all-gather (n-1) times its part, the others (n-1)/n."""
    if n <= 1 or op == "recv":
        return 0
    if op == "all_reduce":
        return round(2 * payload * (n - 1) / n)
    if op == "all_gather":
        return payload * (n - 1)
    if op in {"reduce_scatter", "all_to_all"}:
        return round(payload * (n - 1) / n)
    return payload


def rooted_bytes(op: str, payload: int, n: int, place: int) -> int:
    """Bytes that the rank ``place`` behind the root sends; what all get, or give, goes from neighbour to neighbour."""
    if op == "scatter":
        return 0 if place else round(payload * (n - 1) / n)
    if op == "broadcast":
        return payload if place < n - 1 else 0
    return payload if place else 0
