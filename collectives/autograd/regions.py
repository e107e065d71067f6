"""Entering and leaving a parallel region, with tensors that sum to the whole on one way and are whole on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import primitive
from ..primitive import Group, Started


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


class _EnterRows(Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *as_one(grads, lambda g: primitive.all_reduce(g, ctx.group)))


def enter(x: Tensor, group: Group) -> Tensor:
    """Enter a parallel region with a replicated tensor: identity; backward sums the partial gradients.

    Collective: none forward; one all-reduce of the bytes of ``x`` backward.
    """
    if group is None or not needs_grad(x):
        return x
    flight = getattr(x, "_plait_flight", None)
    return _Enter.apply(x, group) if flight is None else _EnterLater.apply(x, group, flight)


def leave(x: Tensor, group: Group) -> Tensor:
    """Leave a parallel region with a partial tensor: sum over the group; backward is the identity.

    Collective: one all-reduce forward; none backward. Without autograd the sum is made in place in ``x``.
    """
    if group is None:
        return x
    return _Leave.apply(x, group) if needs_grad(x) else primitive.all_reduce(x.contiguous(), group)


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


def enter_rows(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Enter a parallel region with several [rows, width] tensors; their gradients travel together.

    Collective: none forward; one all-reduce backward.
    """
    if group is None or not any(needs_grad(x) for x in tensors):
        return tensors
    return _EnterRows.apply(group, *tensors)


def as_one(grads: Sequence[Tensor], send: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Send several [rows, width] tensors as one message if they are of one dtype."""
    if len({g.dtype for g in grads}) > 1:
        return [send(g.contiguous().clone()) for g in grads]
    widths = [g.shape[1] for g in grads]
    return list(send(torch.cat(list(grads), 1)).split(widths, 1))


def needs_grad(x: Tensor) -> bool:
    """Say whether autograd records what happens to ``x``."""
    return torch.is_grad_enabled() and x.requires_grad
