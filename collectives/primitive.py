"""Collectives on plain tensors: no autograd, no copies that are not needed.

Every function takes a c10d ``ProcessGroup`` or ``None``; ``None`` is a group of one rank and sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

# The group's own methods are called, not the functions of torch.distributed: they reach the same c10d
# operators without 30 us of Python on the way, which a decode step would pay dozens of times.
Group = dist.ProcessGroup | None


def chunk_sizes(length: int, ranks: int) -> list[int]:
    """Split a length over ranks as ``torch.chunk`` and DTensor do: full chunks first, the last ones short or empty."""
    step = -(-length // ranks)
    return [max(0, min(step, length - step * r)) for r in range(ranks)]


def message_device(group: Group) -> torch.device:
    """The device on which small host messages travel in this group: the CPU if it can, else this rank's GPU."""
    if group is None or any(device.type == "cpu" for device in group._device_types):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@cache
def _options(kind: type, op: Any = None, *, waits: bool = True) -> Any:
    """Make the options of an operator once. If the caller waits, a CUDA backend queues on the current stream."""
    options = kind()
    options.asyncOp = not waits
    if op is not None:
        options.reduceOp = op
    return options


def _finish(work: dist.Work | None) -> None:
    """Wait for a collective; backends that have already waited give None."""
    if work is not None:
        work.wait()


@dataclass(frozen=True)
class Started:
    """A collective under way. What was brought to it must not be written to before ``wait``."""

    work: dist.Work | None
    brought: Tensor
    arrived: Tensor

    def wait(self) -> Tensor:
        """Give what arrived, when it has."""
        _finish(self.work)
        return self.arrived


def all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum a tensor over the group, in place.

    Collective: all ranks of the group; sends 2 * (n - 1) / n of the bytes of ``x`` per rank (ring).
    """
    if group is not None:
        _finish(group.allreduce([x], _options(dist.AllreduceOptions, op)))
    return x


def all_gather(x: Tensor, group: Group, sizes: Sequence[int] | None = None, dim: int = 0) -> Tensor:
    """Concatenate every rank's tensor along ``dim``.

    Uneven sizes are padded to the largest, because gloo refuses an uneven all-gather.

    Shape: [..., sizes[rank], ...] -> [..., sum(sizes), ...]
    Collective: all ranks of the group; each receives (n - 1) * max(sizes) rows.
    """
    if group is None:
        return x
    n = group.size()
    sizes = [x.shape[dim]] * n if sizes is None else list(sizes)
    if x.shape[dim] != sizes[group.rank()]:
        raise ValueError(
            f"all_gather: this rank holds {x.shape[dim]} rows of dim {dim}, sizes say {sizes}"
        )
    rows = x.movedim(dim, 0)
    most = max(sizes)
    if rows.shape[0] != most:
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        rows = padded
    out = rows.new_empty((n * most, *rows.shape[1:]))
    _finish(group._allgather_base(out, rows.contiguous(), _options(AllgatherOptions)))
    if any(s != most for s in sizes):
        out = torch.cat([out[r * most : r * most + s] for r, s in enumerate(sizes)])
    return out.movedim(0, dim)


def reduce_scatter(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Sum over the group and keep this rank's chunk (``torch.chunk`` rule) of ``dim``.

    Shape: [..., length, ...] -> [..., chunk_sizes(length, n)[rank], ...]
    Collective: all ranks of the group; sends (n - 1) / n of the padded bytes per rank.
    """
    if group is None:
        return x
    n = group.size()
    length = x.shape[dim]
    sizes = chunk_sizes(length, n)
    rows = x.movedim(dim, 0)
    if length != n * sizes[0]:
        padded = rows.new_zeros((n * sizes[0], *rows.shape[1:]))
        padded[:length] = rows
        rows = padded
    out = rows.new_empty((sizes[0], *rows.shape[1:]))
    options = _options(dist.ReduceScatterOptions)
    _finish(group._reduce_scatter_base(out, rows.contiguous(), options))
    return out[: sizes[group.rank()]].movedim(0, dim)


def all_to_all(
    x: Tensor, group: Group, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Tensor:
    """Exchange runs of rows of dim 0; run r goes to rank r of the group.

    Shape: [sum(send), ...] -> [sum(receive), ...]
    Collective: all ranks of the group; each sends its rows except the run it keeps.
    """
    if group is None:
        return x
    rows = x.shape[0] if receive is None else sum(receive)
    out = x.new_empty((rows, *x.shape[1:]))
    uneven = ([] if receive is None else list(receive), [] if send is None else list(send))
    options = _options(dist.AllToAllOptions)
    _finish(group.alltoall_base(out, x.contiguous(), *uneven, options))
    return out


def start_all_to_all(
    x: Tensor,
    group: dist.ProcessGroup,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Started:
    """Begin an exchange of runs of rows of dim 0, and return while it is under way.

    It moves on without its caller: gloo and NCCL by their own threads, shm and mpi by their progress thread.

    Shape: as ``all_to_all``; without counts the rows are a multiple of the group's size
    Collective: as ``all_to_all``; all ranks start, in one order, what they start.
    """
    x = x.contiguous()
    rows = x.shape[0] if receive is None else sum(receive)
    out = x.new_empty((rows, *x.shape[1:]))
    uneven = ([] if receive is None else list(receive), [] if send is None else list(send))
    work = group.alltoall_base(out, x, *uneven, _options(dist.AllToAllOptions, waits=False))
    return Started(work, x, out)


def start_all_reduce(x: Tensor, group: Group) -> Started:
    """Begin to sum a contiguous tensor over the group, in place, and return while it is under way.

    Collective: as ``all_reduce``; all ranks start, in one order, what they start.
    """
    work = None
    if group is not None:
        options = _options(dist.AllreduceOptions, dist.ReduceOp.SUM, waits=False)
        work = group.allreduce([x], options)
    return Started(work, x, x)
