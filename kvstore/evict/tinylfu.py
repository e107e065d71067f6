"""W-TinyLFU (Einziger, Friedman, Manes 2017): the newcomer must be more popular than whom it replaces."""

from __future__ import annotations

import numpy as np

from ...cuda_kernels.kernel_cache import njit
from .leaves import drop as heap_drop
from .leaves import exposed, forget_gone
from .leaves import push as heap_push
from .policy import Chain
from .queues import NEW, PROVEN, TwoQueuePolicy

_ROWS = 4
_MOST = 255
_SAMPLES = 10  # uses per counter before all counters are halved

_ASKED = 15  # pages of the main part that one eviction compares: four levels of the heap


@njit()
def _slot(key, row, width):
    mixed = (key ^ (key >> np.uint64(17))) * (np.uint64(0x9E3779B97F4A7C15) + np.uint64(2 * row))
    return np.int64((mixed >> np.uint64(32)) % np.uint64(width))


@njit()
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


@njit()
def popularity(sketch, key):
    """Give the uses of a key, or a little more."""
    least = _MOST
    for row in range(sketch.shape[0]):
        least = min(least, sketch[row, _slot(key, row, sketch.shape[1])])
    return least


@njit()
def _promote(window, main, where, rank, queue, sizes, parents, page):
    """Move a leaf of the window to the main part, and the pages before it."""
    heap_drop(window, where, rank, page)
    heap_push(main, where, rank, page)
    while page >= 0 and queue[page] == NEW:
        queue[page] = PROVEN
        sizes[NEW] -= 1
        sizes[PROVEN] += 1
        page = parents[page]


@njit()
def _least_popular(heap, sketch, keys):
    """Give the least popular of some of the longest unused: those near the top of the heap."""
    page = heap[1]
    least = popularity(sketch, keys[page])
    for at in range(2, min(heap[0], _ASKED) + 1):
        uses = popularity(sketch, keys[heap[at]])
        if uses < least:
            page, least = heap[at], uses
    return page


@njit()
def _choose(
    window, main, where, rank, sketch, keys, queue, sizes, share, parents, children, holders, gone,
    out,
):  # fmt: skip
    """Fill `out` with victims; sizes: clock, pages of the window, pages of the main part."""
    count = 0
    room = (1 - share) * (sizes[NEW] + sizes[PROVEN])
    while count < len(out) and window[0] + main[0] > 0:
        page = _least_popular(main, sketch, keys) if main[0] > 0 else window[1]
        if window[0] > 0:
            newcomer = window[1]
            if sizes[PROVEN] < room and window[0] > 1:
                _promote(window, main, where, rank, queue, sizes, parents, newcomer)
                continue
            if popularity(sketch, keys[newcomer]) > popularity(sketch, keys[page]):
                _promote(window, main, where, rank, queue, sizes, parents, newcomer)
            else:
                page = newcomer
        heap_drop(main if queue[page] == PROVEN else window, where, rank, page)
        sizes[queue[page]] -= 1
        out[count] = page
        count += 1
        parent = exposed(parents, children, holders, gone, page)
        if parent >= 0:
            heap_push(main if queue[parent] == PROVEN else window, where, rank, parent)
    forget_gone(parents, gone, out[:count])
    return count


class TinyLFU(TwoQueuePolicy):
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
        super().__init__()
        self._sketch = np.zeros((_ROWS, 1), np.uint8)
        self._counted = 0

    def attach(self, chain: Chain) -> None:
        super().attach(chain)
        # What was counted stays: a counter of the narrow sketch stands for those of the wide one, a multiple of it.
        times = -(-max(chain.capacity, 64) // self._sketch.shape[1])
        self._sketch = np.tile(self._sketch, (1, times))

    def _use(self, pages: np.ndarray) -> None:
        queues = self._queues
        queues.sizes[0] += 1
        queues.leaves.rank[pages] = queues.sizes[0]
        count_uses(self._sketch, queues.keys[pages])
        self._counted += len(pages)
        if self._counted > _SAMPLES * self._sketch.shape[1]:
            self._sketch >>= 1
            self._counted //= 2

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        self._queues.enter(pages, keys, NEW)
        self._use(pages)

    def touched(self, pages: np.ndarray) -> None:
        self._use(pages)

    def victims(self, count: int) -> np.ndarray:
        queues, new, chain = self._queues, self._queues.leaves, self._queues.chain
        out = np.empty(min(count, chain.capacity), np.int32)
        out = out[
            : _choose(
                new.heap, queues.proven, new.where, new.rank, self._sketch, queues.keys,
                queues.queue, queues.sizes, self.window_share, chain.parents, chain.children,
                chain.holders, new.gone, out,
            )
        ]  # fmt: skip
        queues.queue[out] = 0
        return out
