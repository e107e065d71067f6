"""Which slices of a whole tensor each rank holds. Pure arithmetic, with its inverse beside it.

A ``Cut`` is one dim and, for every rank of the model group, the runs of that dim the rank holds. All layouts of the
library are cuts: column and row parallel (one run), fused projections (a run of each part), replicated KV heads (the
same run on several ranks), Helix output projections (runs in head order, not rank order), vocabularies that no rank
count divides (a short last run).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives.primitive import chunk_sizes

Run = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """Runs ``(start, stop)`` of ``dim`` held by each rank; a run may be held by several ranks."""

    dim: int
    length: int
    runs: tuple[tuple[Run, ...], ...]

    def __post_init__(self) -> None:
        covered = sorted({run for rank in self.runs for run in rank if run[0] < run[1]})
        ends = [0, *(stop for _, stop in covered)]
        starts = [*(start for start, _ in covered), self.length]
        if ends != starts:
            raise ValueError(
                f"a cut of dim {self.dim} must cover [0, {self.length}) without overlap, it has {covered}"
            )

    @classmethod
    def chunks(cls, dim: int, length: int, order: Sequence[int], parts: int = 1) -> Cut:
        """Cut each of ``parts`` equal parts of ``dim`` into chunks; rank r takes chunk ``order[r]``.

        Chunks follow ``torch.chunk`` (the last may be short or empty), which is also DTensor's rule.
        """
        part = length // parts
        if part * parts != length:
            raise ValueError(f"{parts} equal parts do not make dim {dim} of length {length}")
        ranks = max(order) + 1
        sizes = chunk_sizes(part, ranks)
        starts = [sum(sizes[:c]) for c in range(ranks)]
        runs = tuple(
            tuple((p * part + starts[c], p * part + starts[c] + sizes[c]) for p in range(parts))
            for c in order
        )
        return cls(dim, length, runs)

    def extent(self, rank: int) -> int:
        """Length of ``dim`` on one rank."""
        return sum(stop - start for start, stop in self.runs[rank])

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of one rank's part of a tensor of the whole ``shape``."""
        local = list(shape)
        local[self.dim] = self.extent(rank)
        return tuple(local)

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """Copy one rank's part out of the whole tensor. The inverse of ``join``."""
        return self.read(lambda start, stop: whole.narrow(self.dim, start, stop - start), rank)

    def read(self, slice_of: Callable[[int, int], Tensor], rank: int) -> Tensor:
        """Build one rank's part from slices of ``dim``, for example read from a file, one at a time."""
        pieces = [slice_of(start, stop) for start, stop in self.runs[rank]]
        return (
            pieces[0].clone(memory_format=torch.contiguous_format)
            if len(pieces) == 1
            else torch.cat(pieces, self.dim)
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put every rank's part together; of a run held by several ranks the first holder's is taken."""
        shape = list(parts[0].shape)
        shape[self.dim] = self.length
        whole = parts[0].new_empty(shape)
        done: set[Run] = set()
        for part, runs in zip(parts, self.runs, strict=True):
            offset = 0
            for start, stop in runs:
                if (start, stop) not in done:
                    whole.narrow(self.dim, start, stop - start).copy_(
                        part.narrow(self.dim, offset, stop - start)
                    )
                    done.add((start, stop))
                offset += stop - start
        return whole

    def shared(self, rank: int) -> dict[tuple[int, ...], tuple[Run, ...]]:
        """Local ranges of ``dim`` by the ranks that hold them, where these are several: their gradients are partial.

        Parts of one tensor can differ in this: in a fused projection with copied KV heads, q rows have one holder.
        """
        found: dict[tuple[int, ...], tuple[Run, ...]] = {}
        offset = 0
        for start, stop in self.runs[rank]:
            holders = tuple(r for r, runs in enumerate(self.runs) if (start, stop) in runs)
            if len(holders) > 1 and start < stop:
                found[holders] = (*found.get(holders, ()), (offset, offset + stop - start))
            offset += stop - start
        return found

    def offset_of(self, rank: int, start: int, stop: int) -> int | None:
        """Local offset of ``[start, stop)`` if this rank holds it in one piece, else None."""
        offset = 0
        for first, last in self.runs[rank]:
            if first <= start and stop <= last:
                return offset + start - first
            offset += last - first
        return None
