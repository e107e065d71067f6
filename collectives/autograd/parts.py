"""Gathering, keeping and exchanging parts of a tensor. Each forward stands beside its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .. import primitive
from ..primitive import Group, chunk_sizes
from .regions import as_one, needs_grad


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, list(sizes)
        return primitive.all_gather(x, group, sizes, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return own_part(grad, ctx.group, ctx.dim, ctx.sizes).contiguous(), None, None, None


class _GatherPartial(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.backward(ctx, primitive.all_reduce(grad.contiguous().clone(), ctx.group))


class _GatherSequence(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitive.reduce_scatter(grad, ctx.group, ctx.dim), None, None, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        ctx.sizes = chunk_sizes(x.shape[dim], group.size())  # type: ignore[union-attr]
        return own_part(x, group, dim, ctx.sizes).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitive.all_gather(grad, ctx.group, ctx.sizes, ctx.dim), None, None


class _ScatterSequence(_Split):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        ctx.sizes = chunk_sizes(x.shape[dim], group.size())  # type: ignore[union-attr]
        return primitive.reduce_scatter(x, group, dim)


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


class _SplitRows(Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.sizes = chunk_sizes(tensors[0].shape[0], group.size())  # type: ignore[union-attr]
        return tuple(own_part(x, group, 0, ctx.sizes).contiguous() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *as_one(grads, lambda g: primitive.all_gather(g, ctx.group, ctx.sizes)))


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
    return (_GatherPartial if partial else _Gather).apply(x, group, dim, sizes)


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
    if group is None:
        return x
    return _GatherSequence.apply(x, group, dim, chunk_sizes(length, group.size()))


def scatter_sequence(x: Tensor, group: Group, dim: int) -> Tensor:
    """Sum a partial tensor and keep this rank's chunk of the sequence; backward gathers.

    Shape: [batch, seq, hidden] -> [batch, seq/tp, hidden]
    Collective: all ranks of the group; one reduce-scatter forward, one all-gather backward.
    """
    return x if group is None else _ScatterSequence.apply(x, group, dim)


def split_rows(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keep this rank's chunk of the rows of several replicated [rows, width] tensors.

    Shape: [rows, width] -> [chunk_sizes(rows, n)[rank], width], each
    Collective: none forward; one all-gather of all of them backward.
    """
    return tensors if group is None else _SplitRows.apply(group, *tensors)


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
    if group is None:
        if meanwhile is not None:
            meanwhile()
        return x
    if meanwhile is None:
        exchange = _AllToAll.apply if needs_grad(x) else primitive.all_to_all
        return exchange(x, group, send, receive)
    started = primitive.start_all_to_all(x.detach(), group, send, receive)
    meanwhile()
    arrived = started.wait()
    return _Arrived.apply(x, group, send, receive, arrived) if needs_grad(x) else arrived


def own_part(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    """Slice this rank's run of ``dim``."""
    rank = 0 if group is None else group.rank()
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank])
