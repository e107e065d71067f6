"""Replicas: every dp rank holds all parameters of its part, and gradients are averaged as backward makes them.

torch's own two ways were tried and not taken (docs/decisions/023-data-parallel.md): DDP's reducer wants to see the
output of every forward, cannot be taken off a module again, and does not know pipelines' many backward runs; FSDP2 over
a replicate mesh makes every parameter a DTensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..edits import AddHook, Edit, SetAttribute, SumGradient
from ..tensor import hook_gradient

BUCKET_BYTES = 25 * 2**20  # DDP's default: large enough for the wire, small enough to overlap


@dataclass
class Bucket:
    """Parameters of one dtype and device whose gradients travel together."""

    parameters: list[nn.Parameter]
    waiting: set[int] = field(default_factory=set)
    flat: Tensor | None = None
    work: Any = None

    def reset(self) -> None:
        """Wait for every gradient again."""
        self.waiting = {id(p) for p in self.parameters}
        self.flat = self.work = None

    def launch(self, group: dist.ProcessGroup) -> None:
        """Start the sum of the gradients, and of a flag for each that says whether this rank had one.

        Collective: all dp ranks; the bytes of the bucket and one element per parameter, all-reduced.
        """
        first = self.parameters[0]
        flags = torch.tensor([float(p.grad is not None) for p in self.parameters])
        grads = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters
        ]
        self.flat = torch.cat([*grads, flags.to(first)])
        self.work = group.allreduce([self.flat])

    def finish(self, ranks: int) -> None:
        """Wait, and give every parameter the mean; one that no rank used keeps no gradient."""
        assert self.flat is not None
        self.work.wait()
        flags = self.flat[-len(self.parameters) :]
        used = [1.0] * len(flags) if flags.is_meta else flags.tolist()
        parts = self.flat[: -len(self.parameters)].split([p.numel() for p in self.parameters])
        for p, part, count in zip(self.parameters, parts, used, strict=True):
            if count:
                # the bucket becomes the gradients: no copy back
                p.grad = part.div_(ranks).view_as(p)
        self.reset()


class Reducer:
    """Averages gradients over dp in buckets, in one order on every rank, while backward still runs.

    Buckets follow the parameters from last to first, about the order in which backward fills them. One is sent when it
    and all before it are full; what is left is sent when backward ends, with zeros for parameters this rank did not
    use. Under accumulation only the last backward is to reduce (``no_sync`` for the others): the mean of what has
    accumulated is then the sum of the means.

    State: one flat copy of the gradients of the buckets on the way, whose parts then take the gradients' place.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters = list(parameters)[::-1]
        self.group = group
        self.on = True
        self._buckets: list[Bucket] = []
        self._of: dict[int, int] = {}
        self._sent = 0
        self._running = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each rank; the next backward outside reduces them all."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def begin(self) -> None:
        """Expect gradients until the running backward ends; a second call in one backward does nothing."""
        if not self.on or self._running:
            return
        self._start()
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Forget a backward that raised, before the next forward."""
        self._running = False

    def ready(self, parameter: Tensor) -> None:
        """Take note of a gradient that is complete; sends the buckets that are full."""
        if not self.on:
            return
        self.begin()
        at = self._of.get(id(parameter))
        if at is None:
            return
        if at < self._sent:
            self._running = False
            raise RuntimeError(
                "a parameter's gradient came again after it was sent to the other dp ranks; use activation "
                "checkpointing with use_reentrant=False, and one backward at a time"
            )
        self._buckets[at].waiting.discard(id(parameter))
        while self._sent < len(self._buckets) and not self._buckets[self._sent].waiting:
            self._send()

    def reduce(self) -> None:
        """Average what all parameters hold now; for gradients that no backward of this model left here."""
        if self.on:
            self._start()
            self._finish()

    def _start(self) -> None:
        wanted = [p for p in self.parameters if p.requires_grad]
        if [id(p) for p in wanted] != list(self._of):
            self._fill(wanted)
        for bucket in self._buckets:
            bucket.reset()
        self._sent, self._running = 0, True

    def _fill(self, parameters: list[nn.Parameter]) -> None:
        """Put parameters into buckets; the same on every rank, for they are trained alike."""
        self._buckets, self._of, held = [], {}, 0
        for p in parameters:
            last = self._buckets[-1].parameters[-1] if self._buckets else None
            alike = last is not None and (last.dtype, last.device) == (p.dtype, p.device)
            if not alike or held > BUCKET_BYTES:
                self._buckets.append(Bucket([]))
                held = 0
            self._buckets[-1].parameters.append(p)
            self._of[id(p)] = len(self._buckets) - 1
            held += p.numel() * p.element_size()

    def _send(self) -> None:
        self._buckets[self._sent].launch(self.group)
        self._sent += 1

    def _finish(self) -> None:
        if not self._running:
            return
        with torch.no_grad():
            while self._sent < len(self._buckets):
                self._send()
            for bucket in self._buckets:
                bucket.finish(self.group.size())
        self._running = False


@dataclass
class Reduce:
    """Average a model's gradients over dp, whatever parameters it has when this is applied.

    Parameters that an edit says are summed over dp already (experts) are divided only.
    """

    model: nn.Module
    group: dist.ProcessGroup
    summed: list[SumGradient]
    reducer: Reducer | None = None
    _handles: list[Any] = field(default_factory=list)

    def apply(self) -> None:
        summed = {id(e.module.get_parameter(e.name)) for e in self.summed}
        shared = [p for p in self.model.parameters() if id(p) not in summed]
        self.reducer = reducer = Reducer(shared, self.group)
        for p in self.model.parameters():
            if id(p) in summed:
                self._handles.append(hook_gradient(p, lambda g: g / self.group.size()))
            else:
                self._handles.append(_after(p, reducer.ready))

    def undo(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _after(parameter: nn.Parameter, hook: Any) -> Any:
    """Hook the accumulation of a gradient, also of a parameter that is frozen now."""
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(wanted)
    return handle


def replica_edits(model: nn.Module, group: dist.ProcessGroup, edits: list[Edit]) -> list[Edit]:
    """Edits that average gradients over dp; applied when the parameters are as cut.

    Collective: all dp ranks in every backward; the bytes of this rank's parameters, all-reduced.
    """
    summed = [e for e in edits if isinstance(e, SumGradient) and e.over_dp]
    reduce = Reduce(model, group, summed)

    def begin(_: nn.Module, args: Any, output: Any) -> None:
        reducer = reduce.reducer
        assert reducer is not None
        reducer.forget()
        # The outermost backward must be the one that ends the reduction: reentrant checkpointing nests others in it.
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: reducer.begin())

    def no_sync() -> Any:
        """Accumulate gradients without sending them; a context manager, as DDP's."""
        assert reduce.reducer is not None
        return reduce.reducer.no_sync()

    return [
        reduce,
        AddHook(lambda: model.register_forward_hook(begin)),
        SetAttribute(model, "no_sync", no_sync),
    ]
