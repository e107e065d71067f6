"""Who holds which tokens of a sequence under context parallelism. Pure arithmetic, with its inverse beside it.

In a causal model later tokens see more keys, so the sequence is cut into twice as many chunks as the ring has
places, and place r holds chunk r and, counted from the end, chunk r again (zig-zag): the work is balanced. The ranks
of one Ulysses group share the chunks of one place evenly. Any length will do: chunks may differ by a token or be
empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import Run


def cut_evenly(run: Run, parts: int) -> list[Run]:
    """Cut a run into parts that differ by at most one token."""
    start, length = run[0], run[1] - run[0]
    ends = [start + p * length // parts for p in range(parts + 1)]
    return list(pairwise(ends))


@dataclass(frozen=True)
class SequenceOrder:
    """The tokens of each of ``ring * ulysses`` ranks; rank ``u + ulysses * r`` is place r of the ring.

    A rank without tokens computes one row all the same, a copy of the first token that nobody sees: modules cannot
    shape zero rows into heads.

    >>> order = SequenceOrder(10, ring=2)
    >>> [order.runs(rank) for rank in range(2)]
    [((0, 2), (7, 10)), ((2, 5), (5, 7))]
    """

    length: int
    ring: int
    ulysses: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.ring * self.ulysses

    def place_runs(self, place: int) -> tuple[Run, ...]:
        """The runs of tokens of one place of the ring."""
        if self.ring == 1:
            return ((0, self.length),)
        chunks = cut_evenly((0, self.length), 2 * self.ring)
        return chunks[place], chunks[-1 - place]

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The runs of tokens of one rank."""
        place, part = divmod(rank, self.ulysses)
        return tuple(cut_evenly(run, self.ulysses)[part] for run in self.place_runs(place))

    def index(self, rank: int) -> Tensor:
        """The tokens of one rank, ascending: ``[seq/cp]``."""
        return _indices(self.runs(rank))

    def place_index(self, place: int) -> Tensor:
        """The tokens of one place of the ring, ascending: ``[seq/ring]``."""
        return _indices(self.place_runs(place))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(
            sum(stop - start for start, stop in self.runs(rank)) for rank in range(self.ranks)
        )

    def rows(self, rank: int) -> int:
        """Rows that a rank computes: its tokens, or one row that stands for none."""
        return max(1, self.counts[rank])

    def take(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Copy one rank's tokens out of a whole tensor: ``[.., seq, ..] -> [.., seq/cp, ..]``. Undone by `restore`."""
        index = self.index(rank) if self.counts[rank] else torch.zeros(1, dtype=torch.long)
        return x.index_select(dim, index.to(x.device))

    def restore(self, parts: Tensor, dim: int = 1) -> Tensor:
        """Put the tokens of all ranks, one rank after the other, back into the order of the sequence."""
        return parts.index_select(dim, self._inverse.to(parts.device))

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.argsort(torch.cat([self.index(rank) for rank in range(self.ranks)]))


def _indices(runs: Sequence[Run]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


__all__ = ["SequenceOrder", "cut_evenly"]
