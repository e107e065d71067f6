"""The contract of an eviction policy: events in, victims out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Chain:
    """How cached pages depend on each other, kept up to date by the store; read it, never write.

    Shape: parents (-1 at the start of a prefix), children, holders: int32 `[capacity]`.
    """

    parents: np.ndarray
    children: np.ndarray
    holders: np.ndarray

    @property
    def capacity(self) -> int:
        """Pages of the store."""
        return len(self.parents)


class EvictionPolicy(Protocol):
    """Chooses which cached pages to lose.

    The store tells what happens to pages (int32 arrays, first page of a prefix first) and asks for
    victims. A page may be named as victim if nobody holds it (it is not pinned) and no cached page
    follows it, or all that do are named before it: successors go before their parents, so every
    cached page can be found. The store checks this and refuses the answer otherwise.

    Called under the store's lock; must not call the store. Keep per-page state in arrays.
    """

    def attach(self, chain: Chain) -> None:
        """Serve this store; called again, with longer arrays, whenever its pool has grown."""
        ...

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        """Pages got content worth keeping; they are pinned now.

        Shape: keys uint64 `[n]`: the same content has the same key when it comes back; depths int64
            `[n]`: how many pages go before each in its prefix.
        """
        ...

    def touched(self, pages: np.ndarray) -> None:
        """Pages were found and are used again; they are pinned now."""
        ...

    def pinned(self, pages: np.ndarray) -> None:
        """Somebody holds pages that nobody held."""
        ...

    def unpinned(self, pages: np.ndarray) -> None:
        """The last holder of pages let go, having used them until now."""
        ...

    def removed(self, pages: np.ndarray) -> None:
        """Pages lost their content, as victims or otherwise."""
        ...

    def victims(self, count: int) -> np.ndarray:
        """Choose 1 to `count` pages to lose, the least valuable first; the store removes them all."""
        ...
