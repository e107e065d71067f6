"""Collectives on plain tensors: no autograd, no copies that are not needed.

Every function takes a c10d ``ProcessGroup`` or ``None``; ``None`` is a group of one rank and sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed the single-tensor forms and warns about the old names; 2.11 has only the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None


def chunk_sizes(length: int, ranks: int) -> list[int]:
    """Split a length over ranks the way ``torch.chunk`` and DTensor do: full chunks first, the last ones short or empty."""
    step = -(-length // ranks)
    return [max(0, min(step, length - step * r)) for r in range(ranks)]


def message_device(group: Group) -> torch.device:
    """The device on which small host messages travel in this group: the CPU if it can, else this rank's GPU."""
    if group is None or any(device.type == "cpu" for device in group._device_types):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum a tensor over the group, in place.

    Collective: all ranks of the group; sends 2 * (n - 1) / n of the bytes of ``x`` per rank (ring).
    """
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
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
    _all_gather_single(out, rows.contiguous(), group=group)
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
    _reduce_scatter_single(out, rows.contiguous(), group=group)
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
    dist.all_to_all_single(
        out,
        x.contiguous(),
        None if receive is None else list(receive),
        None if send is None else list(send),
        group=group,
    )
    return out
