"""Least recently used: the page goes whose last use is longest ago."""

from __future__ import annotations

import numpy as np

from .leaves import Leaves
from .policy import Chain


class LRU:
    """Evict what was not used for longest; the default."""

    def __init__(self) -> None:
        self._leaves = Leaves()
        self._clock = 0

    def attach(self, chain: Chain) -> None:
        self._leaves.attach(chain)

    def _use(self, pages: np.ndarray) -> None:
        self._clock += 1
        self._leaves.rank[pages] = self._clock

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        self._use(pages)

    def touched(self, pages: np.ndarray) -> None:
        self._use(pages)

    def pinned(self, pages: np.ndarray) -> None:
        self._leaves.drop(pages)

    def unpinned(self, pages: np.ndarray) -> None:
        self._use(pages)
        self._leaves.offer(pages)

    def removed(self, pages: np.ndarray) -> None:
        self._leaves.drop(pages)

    def victims(self, count: int) -> np.ndarray:
        return self._leaves.take(count)
