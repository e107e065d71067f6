"""Coded pages of a sequence: runs of pages that were coded together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .in_place import HeldCodes


@dataclass(frozen=True, eq=False)
class CodedRun:
    """Pages of one layer that were coded together; never written again, so forks share them.

    Shape: heads `[pages]` whose each page is, ascending; places `[pages, page_tokens]` int32.
    """

    tier: int
    keys: np.ndarray
    values: np.ndarray
    heads: np.ndarray
    places: np.ndarray

    @property
    def num_bytes(self) -> int:
        """What it takes, places included."""
        return self.keys.size + self.values.size + self.places.nbytes + self.heads.nbytes

    @cached_property
    def last(self) -> int:
        """The last place of any of its tokens."""
        return int(self.places.max())


class Piece(NamedTuple):
    """Some pages of a run: from `start` to before `stop`."""

    run: CodedRun
    start: int
    stop: int


@dataclass
class CodedLayer:
    """The coded pages of one layer of one sequence.

    Attributes:
        loose: newest tokens of each exact lane that follow each other and may be coded when there are enough.
    """

    runs: list[CodedRun] = field(default_factory=list)
    loose: int = 0
    held: dict[int, HeldCodes] = field(default_factory=dict)  # by tier, see `held_codes`
    _pages: tuple[int, list[np.ndarray]] = (0, [])  # of so many runs

    def copy(self) -> CodedLayer:
        """For a fork."""
        return CodedLayer(list(self.runs), self.loose)

    def pages(self, kv_heads: int) -> list[np.ndarray]:
        """Each head's pages in the order in which they were coded. Shape: `[n, 2]`: run, page of it"""
        if self._pages[0] != len(self.runs) or not self._pages[1]:
            heads = np.concatenate([run.heads for run in self.runs] or [np.empty(0, np.int32)])
            each = [(n, at) for n, run in enumerate(self.runs) for at in range(len(run.heads))]
            both = np.array(each, np.int64).reshape(-1, 2)
            self._pages = len(self.runs), [both[heads == head] for head in range(kv_heads)]
        return self._pages[1]

    def counts(self, kv_heads: int) -> np.ndarray:
        """Tokens of each head."""
        out = np.zeros(kv_heads, np.int64)
        for run in self.runs:
            out += np.bincount(run.heads, minlength=kv_heads) * run.places.shape[1]
        return out
