"""W-TinyLFU (Einziger, Friedman, Manes 2017): the newcomer must be more popular than whom it replaces."""

from __future__ import annotations

import numpy as np
from numba import njit

from .leaves import Leaves, exposed, forget_gone, longer
from .leaves import drop as heap_drop
from .leaves import push as heap_push
from .policy import Chain

_ROWS = 4
_MOST = 255
_SAMPLES = 10  # uses per counter before all counters are halved

_ASKED = 15  # pages of the main part that one eviction compares: four levels of the heap

_WINDOW, _MAIN = 1, 2


@njit(cache=True)
def _slot(key, row, width):
    mixed = (key ^ (key >> np.uint64(17))) * (np.uint64(0x9E3779B97F4A7C15) + np.uint64(2 * row))
    return np.int64((mixed >> np.uint64(32)) % np.uint64(width))


@njit(cache=True)
def count_uses(sketch, keys):
    """Add a use of each key to a count-min sketch, raising only its lowest counters."""
    rows, width = sketch.shape
    for key in keys:
        least = popularity(sketch, key)
        if least < _MOST:
            for row in range(rows):
                at = _slot(key, row, width)
                if sketch[row, at] == least:
                    sketch[row, at] = least + 1


@njit(cache=True)
def popularity(sketch, key):
    """Give the uses of a key, or a little more."""
    least = _MOST
    for row in range(sketch.shape[0]):
        least = min(least, sketch[row, _slot(key, row, sketch.shape[1])])
    return least


@njit(cache=True)
def _promote(window, main, where, rank, queue, sizes, parents, page):
    """Move a leaf of the window to the main part, and the pages before it."""
    heap_drop(window, where, rank, page)
    heap_push(main, where, rank, page)
    while page >= 0 and queue[page] == _WINDOW:
        queue[page] = _MAIN
        sizes[_WINDOW] -= 1
        sizes[_MAIN] += 1
        page = parents[page]


@njit(cache=True)
def _least_popular(heap, sketch, keys):
    """Give the least popular of some of the longest unused: those near the top of the heap."""
    page = heap[1]
    least = popularity(sketch, keys[page])
    for at in range(2, min(heap[0], _ASKED) + 1):
        uses = popularity(sketch, keys[heap[at]])
        if uses < least:
            page, least = heap[at], uses
    return page


@njit(cache=True)
def _choose(
    window, main, where, rank, sketch, keys, queue, sizes, share, parents, children, holders, gone,
    out,
):  # fmt: skip
    """Fill `out` with victims; sizes: clock, pages of the window, pages of the main part."""
    count = 0
    room = (1 - share) * (sizes[_WINDOW] + sizes[_MAIN])
    while count < len(out) and window[0] + main[0] > 0:
        page = _least_popular(main, sketch, keys) if main[0] > 0 else window[1]
        if window[0] > 0:
            newcomer = window[1]
            if sizes[_MAIN] < room and window[0] > 1:
                _promote(window, main, where, rank, queue, sizes, parents, newcomer)
                continue
            if popularity(sketch, keys[newcomer]) > popularity(sketch, keys[page]):
                _promote(window, main, where, rank, queue, sizes, parents, newcomer)
            else:
                page = newcomer
        heap_drop(main if queue[page] == _MAIN else window, where, rank, page)
        sizes[queue[page]] -= 1
        out[count] = page
        count += 1
        parent = exposed(parents, children, holders, gone, page)
        if parent >= 0:
            heap_push(main if queue[parent] == _MAIN else window, where, rank, parent)
    forget_gone(parents, gone, out[:count])
    return count


class TinyLFU:
    """Evict the less popular of the oldest newcomer and the least popular of the oldest others.

    The paper's main part is a segmented LRU; here the longest unused are compared by popularity, since
    a store evicts to make room and does not always have a newcomer to compare with. Popularity is
    counted in a sketch over all content that came by, also what is long evicted, and halved now and then.

    Args:
        window_share: share of the cached pages that newcomers may have untested.
    """

    def __init__(self, window_share: float = 0.01) -> None:
        if not 0 < window_share < 1:
            raise ValueError(f"window_share={window_share} must lie between 0 and 1")
        self.window_share = window_share
        self._window, self._main = Leaves(), np.zeros(1, np.int32)
        self._queue = np.zeros(0, np.uint8)
        self._keys = np.zeros(0, np.uint64)
        self._sketch = np.zeros((_ROWS, 1), np.uint8)
        self._counted = 0
        self._sizes = np.zeros(3, np.int64)

    def attach(self, chain: Chain) -> None:
        self._window.attach(chain)
        self._main = longer(self._main, chain.capacity + 1)
        self._queue = longer(self._queue, chain.capacity)
        self._keys = longer(self._keys, chain.capacity)
        self._sketch = np.zeros((_ROWS, max(chain.capacity, 64)), np.uint8)

    def _use(self, pages: np.ndarray) -> None:
        self._sizes[0] += 1
        self._window.rank[pages] = self._sizes[0]
        count_uses(self._sketch, self._keys[pages])
        self._counted += len(pages)
        if self._counted > _SAMPLES * self._sketch.shape[1]:
            self._sketch >>= 1
            self._counted //= 2

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        self._keys[pages] = keys
        self._queue[pages] = _WINDOW
        self._sizes[_WINDOW] += len(pages)
        self._use(pages)

    def touched(self, pages: np.ndarray) -> None:
        self._use(pages)

    def pinned(self, pages: np.ndarray) -> None:
        self._drop(pages)

    def unpinned(self, pages: np.ndarray) -> None:
        mine = self._queue[pages]
        self._window.offer(pages[mine == _WINDOW])
        self._window.offer(pages[mine == _MAIN], self._main)

    def removed(self, pages: np.ndarray) -> None:
        listed = pages[self._queue[pages] > 0]
        self._drop(listed)
        self._sizes[1:] -= np.bincount(self._queue[listed], minlength=3)[1:]
        self._queue[listed] = 0

    def _drop(self, pages: np.ndarray) -> None:
        main = self._queue[pages] == _MAIN
        self._window.drop(pages[~main])
        self._window.drop(pages[main], self._main)

    def victims(self, count: int) -> np.ndarray:
        window, chain = self._window, self._window.chain
        out = np.empty(min(count, chain.capacity), np.int32)
        out = out[
            : _choose(
                window.heap, self._main, window.where, window.rank, self._sketch, self._keys,
                self._queue, self._sizes, self.window_share, chain.parents, chain.children,
                chain.holders, window.gone, out,
            )
        ]  # fmt: skip
        self._queue[out] = 0
        return out
