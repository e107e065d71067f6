"""Two queues of evictable pages, the new and the proven: what S3-FIFO and W-TinyLFU have in common."""

from __future__ import annotations

import numpy as np

from .leaves import Leaves, longer
from .policy import Chain

NEW, PROVEN = 1, 2  # a page's queue; 0: none


class TwoQueues:
    """Which queue each page is in, and of each queue the leaves by rank.

    Attributes:
        leaves: the new pages' heap, and the ranks of all.
        proven: the other heap.
        queue: `[capacity]`, the queue of each page.
        keys: `[capacity]`, the content of each page.
        sizes: clock, pages of the new queue, pages of the proven one; leaves or not.
    """

    def __init__(self) -> None:
        self.leaves, self.proven = Leaves(), np.zeros(1, np.int32)
        self.queue = np.zeros(0, np.uint8)
        self.keys = np.zeros(0, np.uint64)
        self.sizes = np.zeros(3, np.int64)

    @property
    def chain(self) -> Chain:
        """The store's pages."""
        return self.leaves.chain

    def attach(self, chain: Chain) -> None:
        """Follow the store's growth."""
        self.leaves.attach(chain)
        self.proven = longer(self.proven, chain.capacity + 1)
        self.queue = longer(self.queue, chain.capacity)
        self.keys = longer(self.keys, chain.capacity)

    def enter(self, pages: np.ndarray, keys: np.ndarray, queues: np.ndarray | int) -> None:
        """Pages came into a queue; they are pinned now."""
        self.keys[pages] = keys
        self.queue[pages] = queues
        self.sizes += np.bincount(self.queue[pages], minlength=3)

    def offer(self, pages: np.ndarray) -> None:
        """Pages may go, those that are leaves at once."""
        mine = self.queue[pages]
        self.leaves.offer(pages[mine == NEW])
        self.leaves.offer(pages[mine == PROVEN], self.proven)

    def drop(self, pages: np.ndarray) -> None:
        """Pages may not go."""
        proven = self.queue[pages] == PROVEN
        self.leaves.drop(pages[~proven])
        self.leaves.drop(pages[proven], self.proven)

    def removed(self, pages: np.ndarray) -> None:
        """Pages lost their content; those that `victims` named are in no queue any more."""
        listed = pages[self.queue[pages] > 0]
        self.drop(listed)
        self.sizes[1:] -= np.bincount(self.queue[listed], minlength=3)[1:]
        self.queue[listed] = 0


class TwoQueuePolicy:
    """What a policy over two queues does with pages that are held, and let go of."""

    def __init__(self) -> None:
        self._queues = TwoQueues()

    def attach(self, chain: Chain) -> None:
        self._queues.attach(chain)

    def pinned(self, pages: np.ndarray) -> None:
        self._queues.drop(pages)

    def unpinned(self, pages: np.ndarray) -> None:
        self._queues.offer(pages)

    def removed(self, pages: np.ndarray) -> None:
        self._queues.removed(pages)
