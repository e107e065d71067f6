"""The ring: every rank's part visits every rank, and what is added to it on the way comes home.

Two buffers a ring: while the caller works on one part, the next arrives and the present one leaves. Sends and
receives are posted together and never waited for one by one, so rings of two ranks and of odd sizes cannot lock up,
on any c10d backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from .primitive import Group


@dataclass
class Passing:
    """A pass under way. ``sent`` is kept so that its memory lives until it has left."""

    works: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """Wait until this rank's part has left and the previous rank's has come; return the latter."""
        for work in self.works:
            work.wait()
        self.works = []
        return self.received


def pass_on(x: Tensor, into: Tensor, group: dist.ProcessGroup) -> Passing:
    """Start to send ``x`` to the next rank and to receive ``into`` from the previous one.

    Empty parts are not sent; both sides know the sizes.

    Collective: all ranks of the group, as often and in the same order; sends the bytes of ``x``.
    """
    at, size = group.rank(), group.size()
    calls = []
    if x.numel():
        calls.append(dist.P2POp(dist.isend, x, group=group, group_peer=(at + 1) % size))
    if into.numel():
        calls.append(dist.P2POp(dist.irecv, into, group=group, group_peer=(at - 1) % size))
    return Passing(dist.batch_isend_irecv(calls) if calls else [], x, into)


def travel(own: Tensor, group: Group, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Give every rank's part with the number of its rank, this rank's own first; the next one travels meanwhile.

    A part is valid until the next one is asked for. All ranks must go through all parts.

    Args:
        own: this rank's part, one-dimensional and contiguous.
        sizes: elements of each rank's part, equal on all ranks; they may differ, and be zero.

    Collective: all ranks of the group; each sends all parts but the next rank's own, one a pass.
    """
    if group is None:
        yield 0, own
        return
    at, ranks = group.rank(), group.size()
    if own.dim() != 1 or own.numel() != sizes[at]:
        raise ValueError(
            f"travel: this rank's part has shape {list(own.shape)}, sizes say [{sizes[at]}]"
        )
    spare = [own.new_empty(max(sizes)) for _ in range(min(2, ranks - 1))]
    held, passing = own, None
    for step in range(ranks):
        source = (at - step) % ranks
        if step < ranks - 1:
            into = spare[step % len(spare)][: sizes[source - 1]]
            passing = pass_on(held, into, group)
        yield source, held
        if step < ranks - 1:
            assert passing is not None
            held = passing.wait()


@dataclass
class Homecoming:
    """Sums what the ranks add to each part along its way around the ring, and brings the sums home.

    Used beside ``travel``: after the work on each part, ``add`` what belongs to it; at the end ``home`` gives the sum
    for this rank's own part. A sum follows its part one pass behind, so adding waits for nobody who still computes.

    State: one pass under way between calls.
    """

    group: Group
    sizes: Sequence[int]
    step: int = 0
    passing: Passing | None = None
    total: Tensor | None = field(default=None, repr=False)

    def add(self, x: Tensor) -> None:
        """Add to the part that ``travel`` gave last, and send its sum on. ``x`` is taken, not copied.

        Collective: all ranks of the group; sends the bytes of ``x``.
        """
        if self.group is None:
            self.total = x
            return
        if self.passing is not None:
            x = self.passing.wait().add_(x)
        at, ranks = self.group.rank(), self.group.size()
        into = x.new_empty(self.sizes[(at - self.step - 1) % ranks])
        self.passing = pass_on(x, into, self.group)
        self.step += 1

    def home(self) -> Tensor:
        """Wait for the sum of this rank's own part."""
        if self.passing is not None:
            self.total = self.passing.wait()
        assert self.total is not None
        return self.total


__all__ = ["Homecoming", "Passing", "pass_on", "travel"]
