"""S3-FIFO (Yang et al., SOSP 2023): what is used only once leaves early."""

from __future__ import annotations

import numpy as np
from numba import njit

from .leaves import Leaves, exposed, forget_gone, longer
from .leaves import drop as heap_drop
from .leaves import push as heap_push
from .policy import Chain

_SMALL, _MAIN = 1, 2  # a page's queue; 0: none
_MOST_USES = 3


@njit(cache=True)
def _choose(
    small, main, where, rank, uses, queue, sizes, share, parents, children, holders, gone, out
):
    """Fill `out` with victims; sizes: clock, pages of the small queue, pages of the main one."""
    count = 0
    while count < len(out) and small[0] + main[0] > 0:
        early = sizes[_SMALL] > share * (sizes[_SMALL] + sizes[_MAIN])
        if main[0] == 0 or (early and small[0] > 0):
            page, enough = small[1], 2
            heap_drop(small, where, rank, page)
        else:
            page, enough = main[1], 1
            heap_drop(main, where, rank, page)
        sizes[queue[page]] -= 1
        if uses[page] >= enough:
            uses[page] = 0 if queue[page] == _SMALL else uses[page] - 1
            queue[page] = _MAIN
            sizes[_MAIN] += 1
            sizes[0] += 1
            rank[page] = sizes[0]
            heap_push(main, where, rank, page)
            continue
        out[count] = page
        count += 1
        parent = exposed(parents, children, holders, gone, page)
        if parent >= 0:
            heap_push(main if queue[parent] == _MAIN else small, where, rank, parent)
    forget_gone(parents, gone, out[:count])
    return count


class S3FIFO:
    """Evict from a small queue of the new, unless used again, before a main queue of the proven.

    A page that comes back soon after it left the small queue enters the main one. The ghosts, hashes
    of such pages' keys, lie in a table without chains: a new one overwrites an old one.

    Args:
        small_share: share of the cached pages that the small queue may have.
    """

    def __init__(self, small_share: float = 0.1) -> None:
        if not 0 < small_share < 1:
            raise ValueError(f"small_share={small_share} must lie between 0 and 1")
        self.small_share = small_share
        self._small, self._main = Leaves(), np.zeros(1, np.int32)
        self._uses = np.zeros(0, np.uint8)
        self._queue = np.zeros(0, np.uint8)
        self._keys = np.zeros(0, np.uint64)
        self._ghosts = np.zeros(0, np.uint32)
        self._sizes = np.zeros(3, np.int64)

    def attach(self, chain: Chain) -> None:
        self._small.attach(chain)
        self._main = longer(self._main, chain.capacity + 1)
        self._uses = longer(self._uses, chain.capacity)
        self._queue = longer(self._queue, chain.capacity)
        self._keys = longer(self._keys, chain.capacity)
        self._ghosts = longer(self._ghosts, chain.capacity)

    def _ghost(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the place and the mark of each key in the ghost table; no mark is 0."""
        places = (keys >> np.uint64(32)) % np.uint64(len(self._ghosts))
        return places, keys.astype(np.uint32) | np.uint32(1)

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        places, marks = self._ghost(keys)
        back = self._ghosts[places] == marks
        self._keys[pages], self._uses[pages] = keys, 0
        self._queue[pages] = np.where(back, _MAIN, _SMALL)
        self._sizes += np.bincount(self._queue[pages], minlength=3)
        self._small.rank[pages] = self._sizes[0] + 1 + np.arange(len(pages))
        self._sizes[0] += len(pages)

    def touched(self, pages: np.ndarray) -> None:
        self._uses[pages] = np.minimum(self._uses[pages] + 1, _MOST_USES)

    def pinned(self, pages: np.ndarray) -> None:
        self._drop(pages)

    def unpinned(self, pages: np.ndarray) -> None:
        mine = self._queue[pages]
        self._small.offer(pages[mine == _SMALL])
        self._small.offer(pages[mine == _MAIN], self._main)

    def removed(self, pages: np.ndarray) -> None:
        listed = pages[self._queue[pages] > 0]
        self._drop(listed)
        self._sizes[1:] -= np.bincount(self._queue[listed], minlength=3)[1:]
        self._queue[listed] = 0

    def _drop(self, pages: np.ndarray) -> None:
        main = self._queue[pages] == _MAIN
        self._small.drop(pages[~main])
        self._small.drop(pages[main], self._main)

    def victims(self, count: int) -> np.ndarray:
        small, chain = self._small, self._small.chain
        out = np.empty(min(count, chain.capacity), np.int32)
        out = out[
            : _choose(
                small.heap, self._main, small.where, small.rank, self._uses, self._queue,
                self._sizes, self.small_share, chain.parents, chain.children, chain.holders,
                small.gone, out,
            )
        ]  # fmt: skip
        places, marks = self._ghost(self._keys[out[self._queue[out] == _SMALL]])
        self._ghosts[places] = marks
        self._queue[out] = 0
        return out
