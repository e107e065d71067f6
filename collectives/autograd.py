"""Differentiable collectives. Each forward stands beside its backward, which is the forward of its partner.

Two kinds of tensors pass through a parallel region: *replicated* ones (every rank holds the whole value and the
whole gradient) and *partial* ones (the ranks' values, or gradients, sum to the whole).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import primitive
from .primitive import Group, Started, chunk_sizes


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return primitive.all_reduce(grad.contiguous().clone(), ctx.group), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return primitive.all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _LeaveLater(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, flight: list[Started]) -> Tensor:
        flight.append(primitive.start_all_reduce(x.contiguous().clone(), group))
        return flight[0].arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _EnterLater(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, flight: list[Started]) -> Tensor:
        ctx.group, ctx.flight = group, flight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.flight.append(primitive.start_all_reduce(grad.contiguous().clone(), ctx.group))
        return None, None, None  # `_Land` adds it


class _Land(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: list[Started]) -> Tensor:
        ctx.flight = flight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for started in ctx.flight:
            grad = grad + started.wait()
        ctx.flight.clear()
        return grad, None


class _Gather(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sequence[int], partial: bool
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes, ctx.partial = group, dim, list(sizes), partial
        return primitive.all_gather(x, group, sizes, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.partial:
            grad = primitive.all_reduce(grad.contiguous().clone(), ctx.group)
        return own_part(grad, ctx.group, ctx.dim, ctx.sizes).contiguous(), None, None, None, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        ctx.sizes = chunk_sizes(x.shape[dim], group.size())  # type: ignore[union-attr]
        return own_part(x, group, dim, ctx.sizes).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitive.all_gather(grad, ctx.group, ctx.sizes, ctx.dim), None, None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, length: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return primitive.all_gather(x, group, chunk_sizes(length, group.size()), dim)  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitive.reduce_scatter(grad, ctx.group, ctx.dim), None, None, None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        ctx.sizes = chunk_sizes(x.shape[dim], group.size())  # type: ignore[union-attr]
        return primitive.reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitive.all_gather(grad, ctx.group, ctx.sizes, ctx.dim), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, send: Any, receive: Any) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return primitive.all_to_all(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitive.all_to_all(grad, ctx.group, ctx.receive, ctx.send), None, None, None


class _Arrived(_AllToAll):
    """What an exchange that was started before has brought; only its backward is left to do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, send: Any, receive: Any, arrived: Tensor) -> Tensor:  # type: ignore[override]  # fmt: skip
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_AllToAll.backward(ctx, grad), None)


class _EnterRows(Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_as_one(grads, lambda g: primitive.all_reduce(g, ctx.group)))


class _SplitRows(Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.sizes = chunk_sizes(tensors[0].shape[0], group.size())  # type: ignore[union-attr]
        return tuple(own_part(x, group, 0, ctx.sizes).contiguous() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_as_one(grads, lambda g: primitive.all_gather(g, ctx.group, ctx.sizes)))


def _as_one(grads: Sequence[Tensor], send: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Send several [rows, width] tensors as one message if they are of one dtype."""
    if len({g.dtype for g in grads}) > 1:
        return [send(g.contiguous().clone()) for g in grads]
    widths = [g.shape[1] for g in grads]
    return list(send(torch.cat(list(grads), 1)).split(widths, 1))


def own_part(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    """Slice this rank's run of ``dim``."""
    rank = 0 if group is None else group.rank()
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank])


def enter(x: Tensor, group: Group) -> Tensor:
    """Enter a parallel region with a replicated tensor: identity; backward sums the partial gradients.

    Collective: none forward; one all-reduce of the bytes of ``x`` backward.
    """
    if group is None or not needs_grad(x):
        return x
    flight = getattr(x, "_plait_flight", None)
    return _Enter.apply(x, group) if flight is None else _EnterLater.apply(x, group, flight)


def land(x: Tensor, early: int) -> Tensor:
    """Let the sum of the gradient that `enter` brings to this tensor travel behind what else a backward has to do.

    Args:
        early: a sequence number of autograd; nodes made since are done before the sum is waited for.

    Collective: none; backward, the end of those that `enter` started.
    """
    if not needs_grad(x):
        return x
    flight: list[Started] = []
    y = _Land.apply(x, flight)
    y._plait_flight = flight
    y.grad_fn._set_sequence_nr(early)
    return y


def leave_later(x: Tensor, group: Group) -> tuple[Tensor, Started]:
    """Begin to `leave`; the tensor holds the sum when what is under way has been waited for.

    Collective: one all-reduce forward; none backward.
    """
    flight: list[Started] = []
    y = _LeaveLater.apply(x, group, flight)
    return y, flight[0]


def leave(x: Tensor, group: Group) -> Tensor:
    """Leave a parallel region with a partial tensor: sum over the group; backward is the identity.

    Collective: one all-reduce forward; none backward. Without autograd the sum is made in place in ``x``.
    """
    if group is None:
        return x
    return _Leave.apply(x, group) if needs_grad(x) else primitive.all_reduce(x.contiguous(), group)


def enter_rows(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Enter a parallel region with several [rows, width] tensors; their gradients travel together.

    Collective: none forward; one all-reduce backward.
    """
    if group is None or not any(needs_grad(x) for x in tensors):
        return tensors
    return _EnterRows.apply(group, *tensors)


def split_rows(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keep this rank's chunk of the rows of several replicated [rows, width] tensors.

    Shape: [rows, width] -> [chunk_sizes(rows, n)[rank], width], each
    Collective: none forward; one all-gather of all of them backward.
    """
    return tensors if group is None else _SplitRows.apply(group, *tensors)


def gather(
    x: Tensor, group: Group, dim: int, sizes: Sequence[int], *, partial: bool = False
) -> Tensor:
    """Concatenate along ``dim``; backward keeps this rank's part of the gradient. Inverse: ``split``.

    Args:
        partial: each rank uses the gathered tensor for different work, so that gradients must be summed.

    Shape: [..., sizes[rank], ...] -> [..., sum(sizes), ...]
    Collective: all ranks of the group; one all-gather forward, padded to the largest part; backward none, or if
        ``partial`` one all-reduce of the whole.

    Raises:
        ValueError: this rank's part is not as long as ``sizes`` says.
    """
    if group is None:
        return x
    if not needs_grad(x):
        return primitive.all_gather(x, group, sizes, dim)
    return _Gather.apply(x, group, dim, sizes, partial)


def split(x: Tensor, group: Group, dim: int) -> Tensor:
    """Keep this rank's chunk of a replicated tensor; backward gathers. The inverse of ``gather``.

    Shape: [..., length, ...] -> [..., chunk_sizes(length, n)[rank], ...]
    Collective: none forward; one all-gather backward, padded to the largest chunk.
    """
    if group is None:
        return x
    return _Split.apply(x, group, dim)


def gather_sequence(x: Tensor, group: Group, dim: int, length: int) -> Tensor:
    """Gather a sequence-parallel tensor before a tensor-parallel region; backward reduce-scatters.

    Shape: [batch, seq/tp, hidden] -> [batch, seq, hidden]; ``length`` is seq, cut by the rule of ``chunk_sizes``
    Collective: all ranks of the group; one all-gather forward, one reduce-scatter backward.
    """
    return x if group is None else _GatherSequence.apply(x, group, dim, length)


def scatter_sequence(x: Tensor, group: Group, dim: int) -> Tensor:
    """Sum a partial tensor and keep this rank's chunk of the sequence; backward gathers.

    Shape: [batch, seq, hidden] -> [batch, seq/tp, hidden]
    Collective: all ranks of the group; one reduce-scatter forward, one all-gather backward.
    """
    return x if group is None else _ScatterSequence.apply(x, group, dim)


def all_to_all(
    x: Tensor,
    group: Group,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """Exchange runs of rows of dim 0; backward is the exchange with the counts swapped.

    Args:
        send: rows for each rank, and ``receive`` from each; None: equal runs.
        meanwhile: called while the forward's rows are under way.

    Shape: [sum(send), ...] -> [sum(receive), ...]
    Collective: all ranks of the group; one all-to-all forward, one backward. Each sends its rows but its own run.
    """
    if meanwhile is not None:
        if group is None:
            meanwhile()
            return x
        started = primitive.start_all_to_all(x.detach(), group, send, receive)
        meanwhile()
        arrived = started.wait()
        return _Arrived.apply(x, group, send, receive, arrived) if needs_grad(x) else arrived
    if group is None:
        return x
    if not needs_grad(x):
        return primitive.all_to_all(x, group, send, receive)
    return _AllToAll.apply(x, group, send, receive)


def needs_grad(x: Tensor) -> bool:
    """Say whether autograd records what happens to ``x``."""
    return torch.is_grad_enabled() and x.requires_grad
