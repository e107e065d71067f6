"""GreedyDual-Size-Frequency (Cherkasova 1998): the page goes that is cheapest to compute again."""

from __future__ import annotations

import numpy as np

from .leaves import Leaves, longer
from .policy import Chain


class CostAware:
    """Evict what saves the fewest seconds for its bytes, weighing how often and how lately it was used.

    A page's value is `uses * seconds / bytes`, on top of the value of the last page that was evicted:
    so the unused grow old. Pages of one store are equally large, so bytes only scale the values.

    Args:
        attention_share: seconds to attend to one more page of context, as a share of the seconds all
            else takes for one page of tokens. The default is an 8B Llama's in FLOPs with pages of 16
            tokens: attention to 30,000 tokens costs as much as all its matrices.
    """

    def __init__(self, attention_share: float = 16 / 30_000) -> None:
        if not attention_share >= 0:
            raise ValueError(f"attention_share={attention_share} must be at least 0")
        self.attention_share = attention_share
        self._leaves = Leaves()
        self._seconds = np.zeros(0, np.float32)
        self._uses = np.zeros(0, np.uint16)
        self._floor = 0.0

    def attach(self, chain: Chain) -> None:
        self._leaves.attach(chain)
        self._seconds = longer(self._seconds, chain.capacity)
        self._uses = longer(self._uses, chain.capacity)

    def _value(self, pages: np.ndarray) -> None:
        self._leaves.rank[pages] = self._floor + self._uses[pages] * self._seconds[pages]

    def admitted(self, pages: np.ndarray, keys: np.ndarray, depths: np.ndarray) -> None:
        self._seconds[pages] = 1.0 + self.attention_share * depths
        self._uses[pages] = 1
        self._value(pages)

    def touched(self, pages: np.ndarray) -> None:
        self._uses[pages] = np.minimum(self._uses[pages], 65_534) + 1
        self._value(pages)

    def pinned(self, pages: np.ndarray) -> None:
        self._leaves.drop(pages)

    def unpinned(self, pages: np.ndarray) -> None:
        self._value(pages)
        self._leaves.offer(pages)

    def removed(self, pages: np.ndarray) -> None:
        self._leaves.drop(pages)

    def victims(self, count: int) -> np.ndarray:
        pages = self._leaves.take(count)
        if len(pages):
            self._floor = max(self._floor, float(self._leaves.rank[pages].max()))
        return pages
