"""Tables of a call: for each rank, where its run begins and how many elements it has.

Those that are looked up are given again, so nobody writes to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor


@lru_cache(maxsize=1024)
def even_table(ranks: int, count: int, step: int) -> Any:
    """Make a table of equal runs, `step` elements apart."""
    return np.stack([np.arange(ranks) * step, np.full(ranks, count)], 1)


@lru_cache(maxsize=1024)
def even_starts(ranks: int, count: int) -> Any:
    """List where equal runs begin."""
    return np.arange(ranks) * count


@lru_cache(maxsize=1024)
def table_from(root: int, ranks: int, count: int) -> Any:
    """Make a table of one run, the root's."""
    table = np.zeros((ranks, 2), np.int64)
    table[root, 1] = count
    return table


def table_of(tensors: Sequence[Tensor]) -> Any:
    """Make the table of whole tensors, one for each rank."""
    return np.array([(0, x.numel()) for x in tensors], np.int64).reshape(-1, 2)


def table_of_rows(x: Tensor, rows: Sequence[int]) -> Any:
    """Make the table of runs of rows of dim 0, one behind the other."""
    counts = np.array(rows) * (x.numel() // max(1, sum(rows)))
    return np.stack([np.cumsum(counts) - counts, counts], 1)
