"""Fully sharded sparse data parallelism: popular experts are copied for a step to ranks that have tokens for them.

Every expert is owned by one rank, as under plain ep. Before a layer computes, its owners send the experts that had
most rows in the last steps to some more ranks, each within its spare slots; tokens then meet a copy on their own rank,
or the copies evenly. Copies are given back to memory when the layer is done, come again for its backward, and their
gradients are summed at the owner. Source: Hecate (FSSDP).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ...collectives.primitive import Group
from ...collectives.sparse_exchange import Placement as Chunks
from ...collectives.sparse_exchange import (
    Underway,
    start_sparse_all_gather,
    start_sparse_reduce_scatter,
)
from .compute import Packed
from .placement import Placement

WINDOW = 5  # steps whose loads decide


@dataclass
class Materialiser:
    """One layer's copies: which, and where.

    What a forward counts decides for the next one, so that a forward that is computed again for its backward finds the
    same copies.

    State: the rows of each expert in the last steps, and the placement of this one; equal on all owners.
    """

    owned: Placement
    spare: int
    group: Group
    history: deque[list[int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    counted: list[int] | None = None
    placement: Placement | None = None

    def begin(self) -> None:
        """Decide by what was counted before; called when the model's forward begins."""
        if self.counted is not None:
            self.history.append(self.counted)
            self.counted = None
        loads = [sum(rows) for rows in zip(*self.history, strict=True)]
        self.placement = materialised(loads, self.owned, self.spare) if loads else self.owned

    def note(self, every: Tensor) -> None:
        """Take note of the rows of each expert: [sources, slots]."""
        rows = every.sum(0).tolist()
        placement = self.placement or self.owned
        self.counted = [sum(rows[slot] for slot in home) for home in placement.homes]

    @property
    def chunks(self) -> Chunks:
        """The same for the sparse exchanges."""
        return chunks_of(self.owned, self.placement or self.owned)


def materialised(loads: list[int], owned: Placement, spare: int) -> Placement:
    """Add copies to a placement, at most ``spare`` on each rank: where a copy has most to do, on the idlest rank.

    Experts whose copies have no more than an even share to do get none: their weights would travel for little.
    """
    held = [list(own) for own in owned.ranks]
    copies, even = [1] * owned.experts, sum(loads) / owned.experts
    rows = [float(sum(loads[e] for e in own)) for own in held]
    for _ in range(spare * len(held)):
        room = [len(own) < n + spare for own, n in zip(held, owned.sizes, strict=True)]
        options = [
            (-loads[e] / copies[e], e)
            for e in range(owned.experts)
            if loads[e] / copies[e] > even
            and any(free and e not in own for own, free in zip(held, room, strict=True))
        ]
        if not options:
            break
        e = min(options)[1]
        options_of = [r for r, own in enumerate(held) if room[r] and e not in own]
        rank = min(options_of, key=lambda r: (rows[r], r))
        before, after = loads[e] / copies[e], loads[e] / (copies[e] + 1)
        for r, own in enumerate(held):
            rows[r] -= before - after if e in own else 0.0
        rows[rank] += after
        held[rank].append(e)
        copies[e] += 1
    return Placement(owned.experts, tuple(tuple(sorted(own)) for own in held))


def chunks_of(owned: Placement, placement: Placement) -> Chunks:
    """Who owns each expert, and who holds it."""
    owners = {e: rank for rank, own in enumerate(owned.ranks) for e in own}
    holders = [
        tuple(rank for rank, own in enumerate(placement.ranks) if e in own)
        for e in range(owned.experts)
    ]
    return Chunks(tuple(owners[e] for e in range(owned.experts)), tuple(holders))


class _Held(Function):
    """The experts a rank holds, of those it owns; what was gathered is given. Backward sums gradients at the owners."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, arrived: Tensor, chunks: Chunks, group: Group) -> Tensor:
        ctx.of = chunks, group
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return start_sparse_reduce_scatter(grad, *ctx.of).wait(), None, None, None


class Borrowed:
    """A module of experts with other parameters in place of its own."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.module, self._parameters = module, parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@dataclass
class Materialised:
    """The copies of one layer for one forward, on their way since `start`."""

    module: nn.Module
    compute: Packed
    chunks: Chunks
    group: Group
    underway: dict[str, Underway]

    @classmethod
    def start(cls, module: nn.Module, compute: Packed, copies: Materialiser) -> Materialised:
        """Begin to gather every parameter of the experts.

        Collective: the ranks of ep; each owner sends its chunks to their other holders.
        """
        chunks = copies.chunks
        held = {n: p for n, p in module._parameters.items() if p is not None}
        begun = {n: start_sparse_all_gather(p, chunks, copies.group) for n, p in held.items()}
        return cls(module, compute, chunks, copies.group, begun)

    def rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """Send rows through the experts held here; backward gathers the copies again, and keeps none meanwhile."""
        known: dict[int, str] = {}
        held: dict[str, Tensor] = {}
        for name, underway in self.underway.items():
            arrived = underway.wait()
            known[arrived.data_ptr()] = name
            own = self.module.get_parameter(name)
            held[name] = _Held.apply(own, arrived, self.chunks, self.group)

        def pack(tensor: Tensor) -> Tensor | str:
            return known.get(tensor.data_ptr(), tensor) if tensor.numel() else tensor

        def unpack(packed: Tensor | str) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            own = self.module.get_parameter(packed)
            return start_sparse_all_gather(own, self.chunks, self.group).wait()

        module = Borrowed(self.module, held)
        self.underway = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.compute.rows(module, x, counts)
