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

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
    "gather_": "gather",
    "scatter_": "scatter",
}
_BELOW = torch._C.DispatchKey.CompositeExplicitAutograd  # where functional collectives call c10d


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
        if func.namespace == "_c10d_functional":
            return self._functional(func, args, kwargs or {})
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        tensors = _tensors_of(args)
        # Elsewhere than on the CPU a work that is complete is only queued; on meta there is nothing to wait for.
        work = _work_of(result) if any(t.device.type == "cpu" for t in tensors) else None
        if work is not None and not _returns_before(func, args, kwargs or {}):
            work.wait()  # as the caller does next
            work = None
        self._record(func, args, tensors, start, work)
        return result

    def _functional(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a functional collective (DTensor's) so that this trace sees the collective of c10d inside."""
        plain = tree_map_only(AsyncCollectiveTensor, AsyncCollectiveTensor.trigger_wait, args)
        tensors = _tensors_of(plain)
        if any(
            type(x) not in {Tensor, Parameter} for x in tensors
        ) or not func.has_kernel_for_dispatch_key(_BELOW):
            return func(*args, **kwargs)
        with self:
            return func._op_dk(_BELOW, *plain, **kwargs)

    def _record(
        self, func: Any, args: Any, tensors: list[Tensor], start: float, work: dist.Work | None
    ) -> None:
        name: str = func._schema.name
        op = _NAMES.get(name.split("::")[1], name)
        seconds, given = time.perf_counter() - start, _named(func, args)
        group = _group_of(args)
        brought = [] if op == "barrier" else _brought(given, tensors)
        kept, root = _share_kept(given, group), given.get("root_rank")
        self.note(group, op, brought, seconds, work, kept, root)

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
        """Correct an event's seconds when its work is complete."""
        event = self.events[number]

        def complete(_: Any) -> None:
            seconds = time.perf_counter() - event.start
            self.events[number] = replace(self.events[number], seconds=seconds)

        try:
            work.get_future().add_done_callback(complete)
        except (
            RuntimeError,
            NotImplementedError,
        ):  # gloo's messages have none; ours tell who waited for them
            ours: Any = work
            if hasattr(ours, "when_waited_for"):
                ours.when_waited_for = lambda: complete(None)

    def counts(self) -> Counter[tuple[str, str]]:
        """Count the events by (op, axis)."""
        return Counter((e.op, e.axis) for e in self.events)

    def sent_bytes(self) -> int:
        """Sum what this rank sent."""
        return sum(e.sent_bytes for e in self.events)


def _group_of(args: Any) -> dist.ProcessGroup | None:
    for a in args:
        if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()):
            return dist.ProcessGroup.unbox(a)
    return None


def _tensors_of(args: Any) -> list[Tensor]:
    flat = (x for a in args for x in (a if isinstance(a, (list, tuple)) else [a]))
    return [x for x in flat if isinstance(x, Tensor)]


def _work_of(result: Any) -> dist.Work | None:
    """Find the work that an operator of c10d gave back."""
    last = result[-1] if isinstance(result, (tuple, list)) and result else result
    return dist.Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


def _named(func: Any, args: Any) -> dict[str, Any]:
    """Give an operator's arguments by their names."""
    named = zip(func._schema.arguments, args, strict=False)
    return {argument.name: given for argument, given in named}


def _brought(given: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
    """Find what a rank gives: what is called an input; where nothing is, all there is (it is written over)."""
    inputs = [x for name, x in given.items() if name.startswith("input")]
    found = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return found if inputs else tensors


def _share_kept(given: dict[str, Any], group: dist.ProcessGroup | None) -> float | None:
    """The share that a rank keeps of an exchange of parts that may be uneven; None: even parts, or another call."""
    parts = given.get("input_split_sizes")
    if "root_rank" not in given and "output_tensors" in given and "reduce_op" not in given:
        lists = given["input_tensors"]
        many = len(lists) == len(given["output_tensors"]) > 1
        parts = (
            [x.numel() for x in lists]
            if many and isinstance(given["output_tensors"][0], Tensor)
            else None
        )
    if not parts or group is None:
        return None
    return parts[group.rank()] / max(sum(parts), 1)


def _returns_before(func: Any, args: Any, kwargs: Any) -> bool:
    """Say whether a call may return before it is complete: what its argument ``async_op`` says, or else its default."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in {"async_op", "asyncOp"}:
            given = args[place] if place < len(args) else argument.default_value
            return bool(kwargs.get(argument.name, given))
    return True


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
