"""The pages that may go, in order: a heap of the leaves of the trees of cached pages.

Only leaves are kept in the heap (pages nobody holds and no cached page follows), so closing a long
sequence costs one entry. When a leaf is taken its parent becomes one and takes its own place.

`heap` is int32 `[capacity + 1]`: the number of entries, then the pages, a binary heap by `rank`;
`where` int32 `[capacity]` is a page's place in it, 0 if it has none.
"""

from __future__ import annotations

import numpy as np

from ...cuda_kernels.kernel_cache import njit
from .policy import Chain


@njit()
def _up(heap, where, rank, at):
    page = heap[at]
    while at > 1 and rank[heap[at >> 1]] > rank[page]:
        heap[at] = heap[at >> 1]
        where[heap[at]] = at
        at >>= 1
    heap[at] = page
    where[page] = at


@njit()
def _down(heap, where, rank, at):
    page, count = heap[at], heap[0]
    while 2 * at <= count:
        child = 2 * at
        if child < count and rank[heap[child + 1]] < rank[heap[child]]:
            child += 1
        if rank[heap[child]] >= rank[page]:
            break
        heap[at] = heap[child]
        where[heap[at]] = at
        at = child
    heap[at] = page
    where[page] = at


@njit()
def push(heap, where, rank, page):
    """Add a page, or give it its place again after its rank has changed."""
    at = where[page]
    if at == 0:
        heap[0] += 1
        at = heap[0]
        heap[at] = page
        where[page] = at
    _up(heap, where, rank, at)
    _down(heap, where, rank, where[page])


@njit()
def drop(heap, where, rank, page):
    """Take a page out, wherever it is."""
    at = where[page]
    if at == 0:
        return
    last = heap[heap[0]]
    heap[0] -= 1
    where[page] = 0
    if last != page:
        heap[at] = last
        where[last] = at
        _up(heap, where, rank, at)
        _down(heap, where, rank, where[last])


@njit()
def exposed(parents, children, holders, gone, page):
    """Count a leaf as gone; give its parent if that is a leaf now, else -1."""
    parent = parents[page]
    if parent < 0:
        return -1
    gone[parent] += 1
    return parent if gone[parent] == children[parent] and holders[parent] == 0 else -1


@njit()
def forget_gone(parents, gone, pages):
    """Set the counts of `exposed` back."""
    for page in pages:
        if parents[page] >= 0:
            gone[parents[page]] = 0


@njit()
def _offer(heap, where, rank, children, holders, pages):
    for page in pages:
        if children[page] == 0 and holders[page] == 0:
            push(heap, where, rank, page)


@njit()
def _drop_all(heap, where, rank, pages):
    for page in pages:
        drop(heap, where, rank, page)


@njit()
def _take(heap, where, rank, parents, children, holders, gone, out):
    count = 0
    while count < len(out) and heap[0] > 0:
        page = heap[1]
        drop(heap, where, rank, page)
        out[count] = page
        count += 1
        parent = exposed(parents, children, holders, gone, page)
        if parent >= 0:
            push(heap, where, rank, parent)
    forget_gone(parents, gone, out[:count])
    return count


def longer(array: np.ndarray, length: int) -> np.ndarray:
    """Give a copy with zeros added up to a length."""
    return np.concatenate([array, np.zeros(length - len(array), array.dtype)])


class Leaves:
    """The evictable pages of a store by rank, the lowest first.

    Attributes:
        rank: `[capacity]` float64, set by the policy; call `offer` after changing that of a leaf.
    """

    def __init__(self) -> None:
        self.rank = np.zeros(0)
        self.heap = np.zeros(1, np.int32)
        self.where = np.zeros(0, np.int32)
        self.gone = np.zeros(0, np.int32)
        self.chain = Chain(self.where, self.where, self.where)

    def attach(self, chain: Chain) -> None:
        """Follow the store's growth."""
        self.chain = chain
        self.rank, self.heap = (
            longer(self.rank, chain.capacity),
            longer(self.heap, chain.capacity + 1),
        )
        self.where, self.gone = (
            longer(self.where, chain.capacity),
            longer(self.gone, chain.capacity),
        )

    def __len__(self) -> int:
        return int(self.heap[0])

    def offer(self, pages: np.ndarray, heap: np.ndarray | None = None) -> None:
        """Add those of the pages that are leaves; to a second heap of the same pages if given."""
        heap, chain = self.heap if heap is None else heap, self.chain
        _offer(heap, self.where, self.rank, chain.children, chain.holders, pages)

    def drop(self, pages: np.ndarray, heap: np.ndarray | None = None) -> None:
        """Take pages out of the heap they are in, if in any."""
        _drop_all(self.heap if heap is None else heap, self.where, self.rank, pages)

    def take(self, count: int) -> np.ndarray:
        """Take out up to `count` pages by rank, each before its parent."""
        out = np.empty(min(count, len(self.where)), np.int32)
        chain = self.chain
        taken = _take(
            self.heap, self.where, self.rank, chain.parents, chain.children, chain.holders,
            self.gone, out,
        )  # fmt: skip
        return out[:taken]
