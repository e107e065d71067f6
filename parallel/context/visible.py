"""Which keys each query row sees when both are spread over ranks: any mask, evaluated a tile at a time.

A mask is a function of the places of a query and a key in the whole sequence, as transformers defines masks; here
it is asked about the tokens that ranks really hold. So whatever it says (causal, window, documents, padding, chunks)
is exact in every order of the sequence, and no tensor of rows x keys ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

TILE = 512  # rows and keys of a tile: its mask is small, and few tiles straddle an edge of what is visible
MOST_KEYS = 4096  # keys of wholly visible tiles that are taken together
Sees = Callable[[Tensor, Tensor], Tensor]
"""``sees(rows, keys) -> bool [batch or 1, 1, rows, keys]`` for places ``[rows]``, ``[keys]`` in the sequence."""


@dataclass
class Visible:
    """What the rows of this rank see of the keys of every rank of a ring.

    State: what is known of the tiles, found once and shared by the layers and by forward and backward.

    Args:
        rows: place in the sequence of each own row.
        keys: place of each key, by rank of the ring.
    """

    rows: Tensor
    keys: Sequence[Tensor]
    sees: Sees
    _tiles: dict[int, list[tuple[slice, slice, bool]]] = field(default_factory=dict, repr=False)

    def tiles(self, source: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Give the own rows and the keys of one rank that have to do with each other, and their mask if not all have.

        Tiles that nobody sees are left out; neighbours that are wholly seen are joined.
        """
        if source not in self._tiles:
            self._tiles[source] = self._classify(source)
        for rows, keys, partly in self._tiles[source]:
            yield rows, keys, self.mask(source, rows, keys) if partly else None

    def mask(self, source: int, rows: slice, keys: slice) -> Tensor:
        """Evaluate the mask of one tile: ``[batch or 1, 1, rows, keys]``."""
        return self.sees(self.rows[rows], self.keys[source][keys])

    def _classify(self, source: int) -> list[tuple[slice, slice, bool]]:
        found: list[tuple[slice, slice, bool]] = []
        for rows in stretches(self.rows):
            joined: slice | None = None
            for keys in stretches(self.keys[source]):
                seen = self.mask(source, rows, keys)
                if bool(seen.all()):
                    near = joined is not None and joined.stop == keys.start
                    if near and keys.stop - joined.start <= MOST_KEYS:  # type: ignore[union-attr]
                        joined = slice(joined.start, keys.stop)  # type: ignore[union-attr]
                        found[-1] = (rows, joined, False)
                    else:
                        joined = keys
                        found.append((rows, keys, False))
                elif bool(seen.any()):
                    joined = None
                    found.append((rows, keys, True))
        return found


def stretches(places: Tensor) -> list[slice]:
    """Cut tokens into tiles, also where long stretches of neighbours end, so that fewer tiles are partly visible."""
    count = places.numel()
    breaks = (torch.nonzero(torch.diff(places) != 1).flatten() + 1).tolist()
    if len(breaks) > 2 * count // TILE + 2:
        breaks = []
    edges = [0, *breaks, count]
    cut: list[slice] = []
    for start, stop in pairwise(edges):
        cut += [slice(a, min(a + TILE, stop)) for a in range(start, stop, TILE)]
    return cut


__all__ = ["Sees", "Visible", "stretches"]
