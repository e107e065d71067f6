"""A record of every collective that torch's dispatcher sees: operation, axis, shape, bytes, seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_NAMES = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
    "gather_": "gather",
    "scatter_": "scatter",
}


@dataclass(frozen=True)
class Event:
    """One collective as one rank saw it. ``sent_bytes`` is what this rank puts on the wire (ring algorithms)."""

    op: str
    axis: str
    ranks: int
    shape: tuple[int, ...]
    dtype: str
    payload_bytes: int
    sent_bytes: int
    seconds: float
    scope: str = ""


@dataclass
class Trace(TorchDispatchMode):
    """Record the collectives issued inside ``with Trace(axis_of) as trace``.

    ``axis_of`` names a process group (``Groups.axis_of``); without it the axis is ``"group of n"``. Counting rests on
    torch's own dispatcher, so a collective issued by any library is seen, forward and backward.
    """

    axis_of: Callable[[dist.ProcessGroup], str] | None = None
    events: list[Event] = field(default_factory=list)
    scope: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self._record(func, args, time.perf_counter() - start)
        return result

    def _record(self, func: Any, args: Any, seconds: float) -> None:
        name: str = func._schema.name
        op = _NAMES.get(name.split("::")[1], name)
        tensors = [
            t
            for a in args
            for t in (a if isinstance(a, (list, tuple)) else [a])
            if isinstance(t, Tensor)
        ]
        # for ops written (output, input) the tensor a rank brings is the second argument
        second = op in {"all_gather", "reduce_scatter", "all_to_all"} and len(tensors) > 1
        self.note(_group_of(args), op, tensors[1:2] if second else tensors[:1], seconds)

    def note(
        self,
        group: dist.ProcessGroup | None,
        op: str,
        brought: Sequence[Tensor],
        seconds: float,
    ) -> None:
        """Record a call, with the tensors that this rank brought to it."""
        ranks = group.size() if group is not None else 1
        axis = self.axis_of(group) if self.axis_of and group is not None else f"group of {ranks}"
        shape, dtype = (tuple(brought[0].shape), brought[0].dtype) if brought else ((), "")
        payload = sum(x.numel() * x.element_size() for x in brought)
        name, sent = str(dtype).removeprefix("torch."), _sent(op, payload, ranks)
        self.events.append(Event(op, axis, ranks, shape, name, payload, sent, seconds, self.scope))

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


def listening() -> bool:
    """Say whether anything listens; this costs next to nothing."""
    return torch._C._len_torch_dispatch_stack() > 0


def tell_traces(
    group: dist.ProcessGroup, op: str, brought: Sequence[Tensor], seconds: float
) -> None:
    """Record a call in every Trace that is on: for groups written in Python, which the dispatcher does not see."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Trace):
            mode.note(group, op, brought, seconds)


def _sent(op: str, payload: int, n: int) -> int:
    """Bytes one rank sends: ring all-reduce 2(n-1)/n, all-gather (n-1) times its part, the others (n-1)/n."""
    if n <= 1:
        return 0
    if op == "all_reduce":
        return round(2 * payload * (n - 1) / n)
    if op == "all_gather":
        return payload * (n - 1)
    if op in {"reduce_scatter", "all_to_all"}:
        return round(payload * (n - 1) / n)
    return payload
