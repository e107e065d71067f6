"""Sparse all-gather and reduce-scatter: only the chunks that somebody wants leave their owner.

A tensor is a stack of chunks (an expert's weights is one). Each chunk has one owner, and may have more holders.
Gathering brings a chunk from its owner to its holders; scattering sums what the holders made of it (its gradients) at
its owner. So a rank holds the experts that its tokens need most, and not all: the traffic is that share of a gather.
Source: Hecate, fully sharded sparse data parallelism (FSSDP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .primitive import Group

Run = tuple[int, int, int]  # the first row at the owner, the first at the holder, rows


@dataclass(frozen=True)
class Placement:
    """Who owns each chunk, and who holds it; equal on all ranks.

    Attributes:
        owners: by chunk, the rank of the group that owns it.
        holders: by chunk, the ranks that hold it when it is gathered: ascending, its owner among them.
    """

    owners: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.owners) != len(self.holders):
            raise ValueError(
                f"placement: {len(self.owners)} owners for {len(self.holders)} chunks; give one for each chunk"
            )
        for chunk, (owner, holders) in enumerate(zip(self.owners, self.holders, strict=True)):
            if owner not in holders or list(holders) != sorted(set(holders)) or holders[0] < 0:
                raise ValueError(
                    f"placement: chunk {chunk} of rank {owner} is held by {holders}; give its holders in ascending "
                    "order, its owner among them"
                )

    @staticmethod
    def of(owners: Sequence[int], copies: dict[int, Sequence[int]]) -> Placement:
        """Place chunks at their owners and, by chunk, at these ranks too."""
        holders = tuple(
            tuple(sorted({owner, *copies.get(chunk, ())})) for chunk, owner in enumerate(owners)
        )
        return Placement(tuple(owners), holders)

    @cached_property
    def ranks(self) -> int:
        """The least size of a group that has all these ranks."""
        return 1 + max((holders[-1] for holders in self.holders), default=0)

    def owned(self, rank: int) -> list[int]:
        """The chunks that a rank owns, in the order of its rows."""
        return [chunk for chunk, owner in enumerate(self.owners) if owner == rank]

    def held(self, rank: int) -> list[int]:
        """The chunks that a rank holds, in the order of its rows."""
        return [chunk for chunk, holders in enumerate(self.holders) if rank in holders]

    def sent_chunks(self, rank: int) -> int:
        """How many chunks leave a rank in a gather (and arrive there in a scatter)."""
        return sum(len(self.holders[chunk]) - 1 for chunk in self.owned(rank))

    def runs(self, owner: int, holder: int) -> list[Run]:
        """The chunks that one rank owns and another holds, as runs of rows that lie together at both."""
        at_owner = {chunk: row for row, chunk in enumerate(self.owned(owner))}
        found: list[Run] = []
        for row, chunk in enumerate(self.held(holder)):
            if chunk not in at_owner:
                continue
            first, there, rows = found[-1] if found else (-1, -1, 0)
            if (first + rows, there + rows) == (at_owner[chunk], row):
                found[-1] = first, there, rows + 1
            else:
                found.append((at_owner[chunk], row, 1))
        return found


@dataclass(frozen=True)
class Underway:
    """An exchange that goes on while its caller computes. What was brought must not be written to before ``wait``."""

    works: list[dist.Work]
    brought: Tensor
    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """Give what arrived, when all has, and what this rank sent has left."""
        for work in self.works:
            work.wait()
        return self.finish()


def start_sparse_all_gather(own: Tensor, placement: Placement, group: Group) -> Underway:
    """Begin to bring every chunk to its holders; see `sparse_all_gather`."""
    rank, size = _place(group, placement)
    _check(own, placement.owned(rank), "owns", rank)
    own = own.detach().contiguous()
    out = own.new_empty((len(placement.held(rank)), *own.shape[1:]))
    for first, there, rows in placement.runs(rank, rank):
        out[there : there + rows].copy_(own[first : first + rows])
    calls = []
    for peer in _others(rank, size):
        for first, _, rows in placement.runs(rank, peer):
            calls.append((dist.isend, own[first : first + rows], peer))
        for _, there, rows in placement.runs(peer, rank):
            calls.append((dist.irecv, out[there : there + rows], peer))
    return Underway(_started(calls, group), own, lambda: out)


def start_sparse_reduce_scatter(held: Tensor, placement: Placement, group: Group) -> Underway:
    """Begin to sum every chunk at its owner; see `sparse_reduce_scatter`."""
    rank, size = _place(group, placement)
    _check(held, placement.held(rank), "holds", rank)
    held = held.detach().contiguous()
    owned = placement.owned(rank)
    parts: dict[int, list[tuple[Run, Tensor]]] = {}
    calls = []
    for peer in _others(rank, size):
        for _, there, rows in placement.runs(peer, rank):
            calls.append((dist.isend, held[there : there + rows], peer))
        for run in placement.runs(rank, peer):
            room = held.new_empty((run[2], *held.shape[1:]))
            parts.setdefault(peer, []).append((run, room))
            calls.append((dist.irecv, room, peer))
    parts[rank] = [(run, held[run[1] : run[1] + run[2]]) for run in placement.runs(rank, rank)]

    def total() -> Tensor:
        wide = held.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if wide else held.dtype
        out = held.new_zeros((len(owned), *held.shape[1:]), dtype=dtype)
        # in the order of ranks, so that the bits do not depend on who was first
        for peer in sorted(parts):
            for (first, _, rows), part in parts[peer]:
                out[first : first + rows].add_(part)
        return out.to(held.dtype)

    return Underway(_started(calls, group), held, total)


def sparse_all_gather(own: Tensor, placement: Placement, group: Group) -> Tensor:
    """Bring every chunk from its owner to its holders; backward sums the holders' gradients at the owner.

    Shape: [owned chunks, ...] -> [held chunks, ...], both in the order of chunks
    Collective: all ranks of the group; a rank sends each of its chunks to its other holders, and nothing else:
        `placement.sent_chunks(rank)` chunks, in one message for each run of rows. Backward as many the other way.
    Source: Hecate (FSSDP), SparseAllGather(P0, P1).

    Raises:
        ValueError: the tensor has not a row for each chunk this rank owns, or the group is too small.
    """
    return _Gather.apply(own, placement, group)


def sparse_reduce_scatter(held: Tensor, placement: Placement, group: Group) -> Tensor:
    """Sum what the holders of every chunk have at its owner; backward brings the gradient to the holders.

    The sum is in the order of ranks, of 16-bit floats in float32.

    Shape: [held chunks, ...] -> [owned chunks, ...], both in the order of chunks
    Collective: all ranks of the group; a rank sends each chunk it holds but does not own to its owner. Backward the
        other way.
    Source: Hecate (FSSDP), SparseReduceScatter(P0, P1).

    Raises:
        ValueError: the tensor has not a row for each chunk this rank holds, or the group is too small.
    """
    return _Scatter.apply(held, placement, group)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, placement: Placement, group: Group) -> Tensor:
        ctx.of = placement, group
        return start_sparse_all_gather(own, placement, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_sparse_reduce_scatter(grad, *ctx.of).wait(), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, placement: Placement, group: Group) -> Tensor:
        ctx.of = placement, group
        return start_sparse_reduce_scatter(held, placement, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_sparse_all_gather(grad, *ctx.of).wait(), None, None


def _place(group: Group, placement: Placement) -> tuple[int, int]:
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if placement.ranks > size:
        raise ValueError(
            f"placement: a chunk is held by rank {placement.ranks - 1}, but the group has {size} ranks; "
            "place chunks on the ranks of the group"
        )
    return rank, size


def _check(x: Tensor, chunks: list[int], how: str, rank: int) -> None:
    if x.dim() == 0 or x.shape[0] != len(chunks):
        raise ValueError(
            f"sparse exchange: rank {rank} {how} {len(chunks)} chunks, but its tensor has shape {list(x.shape)}; "
            "give a row for each"
        )


def _others(rank: int, size: int) -> Iterator[int]:
    """The other ranks, starting after this one: no rank is everybody's first."""
    return (peer % size for peer in range(rank + 1, rank + size))


def _started(calls: list[tuple[Any, Tensor, int]], group: Group) -> list[dist.Work]:
    """Post all messages together; between two ranks they are in the order of chunks on both sides."""
    operations = [
        dist.P2POp(call, x, group=group, group_peer=peer) for call, x, peer in calls if x.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


__all__ = [
    "Placement",
    "Underway",
    "sparse_all_gather",
    "sparse_reduce_scatter",
    "start_sparse_all_gather",
    "start_sparse_reduce_scatter",
]
