"""S3-FIFO (Yang et al., SOSP 2023): what is used only once leaves early."""

from __future__ import annotations

import numpy as np

from ...cuda_kernels.kernel_cache import njit
from .leaves import drop as heap_drop
from .leaves import exposed, forget_gone, longer
from .leaves import push as heap_push
from .policy import Chain
from .queues import NEW, PROVEN, TwoQueuePolicy

_MOST_USES = 3


@njit()
def _choose(
    small, main, where, rank, uses, queue, sizes, share, parents, children, holders, gone, out
):
    """Fill `out` with victims; sizes: clock, pages of the small queue, pages of the main one."""
    count = 0
    while count < len(out) and small[0] + main[0] > 0:
        early = sizes[NEW] > share * (sizes[NEW] + sizes[PROVEN])
        if main[0] == 0 or (early and small[0] > 0):
            page, enough = small[1], 2
            heap_drop(small, where, rank, page)
        else:
            page, enough = main[1], 1
            heap_drop(main, where, rank, page)
        sizes[queue[page]] -= 1
        if uses[page] >= enough:
            uses[page] = 0 if queue[page] == NEW else uses[page] - 1
            queue[page] = PROVEN
            sizes[PROVEN] += 1
            sizes[0] += 1
            rank[page] = sizes[0]
            heap_push(main, where, rank, page)
            continue
        out[count] = page
        count += 1
        parent = exposed(parents, children, holders, gone, page)
        if parent >= 0:
            heap_push(main if queue[parent] == PROVEN else small, where, rank, parent)
    forget_gone(parents, gone, out[:count])
    return count


class S3FIFO(TwoQueuePolicy):
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
        super().__init__()
        self._uses = np.zeros(0, np.uint8)
        self._ghosts = np.zeros(0, np.uint32)

    def attach(self, chain: Chain) -> None:
        super().attach(chain)
        self._uses = longer(self._uses, chain.capacity)
        self._ghosts = longer(self._ghosts, chain.capacity)

    def _ghost(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the place and the mark of each key in the ghost table; no mark is 0."""
        places = (keys >> np.uint64(32)) % np.uint64(len(self._ghosts))
        return places, keys.astype(np.uint32) | np.uint32(1)

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        places, marks = self._ghost(keys)
        queues = self._queues
        queues.enter(pages, keys, np.where(self._ghosts[places] == marks, PROVEN, NEW))
        self._uses[pages] = 0
        queues.leaves.rank[pages] = queues.sizes[0] + 1 + np.arange(len(pages))
        queues.sizes[0] += len(pages)

    def touched(self, pages: np.ndarray) -> None:
        self._uses[pages] = np.minimum(self._uses[pages] + 1, _MOST_USES)

    def victims(self, count: int) -> np.ndarray:
        queues, new, chain = self._queues, self._queues.leaves, self._queues.chain
        out = np.empty(min(count, chain.capacity), np.int32)
        out = out[
            : _choose(
                new.heap, queues.proven, new.where, new.rank, self._uses, queues.queue,
                queues.sizes, self.small_share, chain.parents, chain.children, chain.holders,
                new.gone, out,
            )
        ]  # fmt: skip
        places, marks = self._ghost(queues.keys[out[queues.queue[out] == NEW]])
        self._ghosts[places] = marks
        queues.queue[out] = 0
        return out
