"""The selector contract: which cached tokens one row of queries reads. Nothing is lost; only reads shrink."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..named import Named


class Selection(NamedTuple):
    """Which tokens each row and KV head of one sequence read, in units of `unit` tokens.

    Unit i holds tokens `[i * unit, (i + 1) * unit)` of the sequence; units of a list are ascending and distinct.

    Shape: list (r, h) is ``indices[indptr[r * kv_heads + h] : indptr[r * kv_heads + h + 1]]``; indptr int64, indices
        int32.
    """

    indptr: Tensor
    indices: Tensor
    unit: int

    @classmethod
    def of(cls, lists: Tensor, unit: int) -> Selection:
        """Equally long lists. Shape: `[rows, kv_heads, n]`"""
        rows, kv_heads, n = lists.shape
        return cls(torch.arange(rows * kv_heads + 1) * n, lists.flatten().int(), unit)


@dataclass(frozen=True)
class KeyView:
    """One sequence's keys in one layer, where they lie, as a selector sees them.

    Shape: keys `[pages, page_tokens, kv_heads, head_dim]` of the whole pool; pages `[n]` int32 the sequence's own, in
        order.

    Attributes:
        tokens: cached tokens of the sequence, the newest included; the row that asks is the last.
        shards: ranks that hold a part of this sequence; each chooses among its own tokens.
        memory: what the selector keeps of this sequence from step to step; empty again when tokens were taken back.
    """

    keys: Tensor
    pages: Tensor
    tokens: int
    layer: int
    layers: int
    scale: float
    shards: int = 1
    memory: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selector(Named):
    """A frozen value that plans what a decode step reads."""

    @abstractmethod
    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        """Choose for rows that see the whole sequence; None reads everything.

        Shape: q `[rows, heads, head_dim]`
        """
