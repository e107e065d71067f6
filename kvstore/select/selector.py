"""The selector contract: which cached tokens one row of queries reads. Nothing is lost; only reads shrink."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...cuda_kernels import unit_scores
from ..named import Named


class Selection(NamedTuple):
    """Which tokens each KV head reads, in units of `unit` tokens.

    Unit i holds tokens `[i * unit, (i + 1) * unit)` of the sequence; units of a list are ascending and distinct.

    Shape: head h reads ``indices[indptr[h] : indptr[h + 1]]``; indptr `[kv_heads + 1]` int64, indices int32.
    """

    indptr: Tensor
    indices: Tensor
    unit: int

    @classmethod
    def of(cls, lists: Tensor, unit: int) -> Selection:
        """Equally long lists. Shape: `[kv_heads, n]`"""
        kv_heads, n = lists.shape
        return cls(torch.arange(kv_heads + 1) * n, lists.flatten().int(), unit)

    @classmethod
    def where(cls, read: Tensor, unit: int) -> Selection:
        """Lists of what is true. Shape: `[kv_heads, units]` bool"""
        indptr = torch.zeros(len(read) + 1, dtype=torch.int64)
        indptr[1:] = read.sum(1).cumsum(0)
        return cls(indptr, read.nonzero()[:, 1].int(), unit)

    def lists(self) -> list[Tensor]:
        """Units of each KV head."""
        return list(self.indices.tensor_split(self.indptr[1:-1].cpu()))


@dataclass(frozen=True)
class KeyView:
    """One sequence's keys in one layer, where they lie, as a selector sees them.

    Shape: keys `[pages, page_tokens, kv_heads, head_dim]` of the whole pool, decoded; pages `[n]` int32 the sequence's
        own, in order.

    Attributes:
        tokens: cached tokens of the sequence, the newest included; the row that asks is the last.
        shards: ranks that hold a part of this sequence; each chooses among its own tokens.
        memory: what the selector keeps of this sequence from step to step, by layer; empty again when tokens were
            taken back.
    """

    keys: Tensor
    pages: Tensor
    tokens: int
    layer: int
    layers: int
    scale: float
    shards: int = 1
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, Any]:
        """What is remembered of this layer."""
        return self.memory.setdefault(self.layer, {})

    @property
    def kv_heads(self) -> int:
        """KV heads there are."""
        return self.keys.shape[2]

    def grouped(self, q: Tensor) -> Tensor:
        """See query heads by the KV head they read, in the kernels' precision.

        Shape: `[heads, head_dim]` -> `[kv_heads, group, head_dim]`
        """
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.to(work).unflatten(0, (self.kv_heads, -1))

    def reach(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys of the tokens from `first` on, and the pages of all tokens among them.

        Shape: -> `[some pages, page_tokens, kv_heads, head_dim]`, `[n]`, of which those before `first` mean nothing
        """
        return self.keys, self.pages

    def rows(self, head: int, tokens: Tensor) -> Tensor:
        """Keys of some tokens of one head. Shape: `[n]` -> `[n, head_dim]`"""
        size = self.keys.shape[1]
        return self.keys[self.pages.long()[tokens // size], tokens % size, head]

    def logits(self, q: Tensor) -> Tensor:
        """Dot products with every key, which are all read for it. Shape: as `grouped` -> `[kv_heads, group, tokens]`"""
        return unit_scores(q, *self.reach(), self.tokens)


@dataclass(frozen=True)
class Selector(Named):
    """A frozen value that plans what a decode step reads.

    Attributes:
        across_layers: whether layers read what an earlier layer chose, so that token i must be the same one in all
            layers and heads; not so where tokens were evicted.
    """

    across_layers: ClassVar[bool] = False

    def queries(self, tokens: int) -> int:
        """How many of the last queries of a prompt of so many tokens it wants to see."""
        return 0

    def prompt(self, q: Tensor, view: KeyView) -> None:
        """See the last queries of a prompt, whose keys are cached.

        Shape: q `[queries, heads, head_dim]`
        """

    @abstractmethod
    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        """Choose for a row that sees the whole sequence; None reads everything.

        Shape: q `[heads, head_dim]`
        """


@dataclass(frozen=True)
class Budgeted(Selector):
    """A selector that reads about so many tokens in each layer but the first few.

    Args:
        budget: tokens each KV head reads: a share of the sequence if at most 1, else a number of tokens, of which each
            rank reads its part.
        dense: layers at the bottom that read everything.
    """

    budget: float = 0.1
    dense: int = 0

    def __post_init__(self) -> None:
        if not self.budget > 0 or self.dense < 0:
            raise ValueError(
                f"{self}: budget={self.budget:g} must be a share in (0, 1] of the tokens or a number of tokens, and "
                f"dense={self.dense} a number of layers"
            )

    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        """Everything where the budget allows it, else what `choose` says."""
        keep = self.keep(view)
        if view.layer < self.dense or keep >= view.tokens:
            return None
        return self.choose(q, view, keep)

    def keep(self, view: KeyView) -> int:
        """Tokens of the budget here."""
        if self.budget <= 1:
            return max(1, round(self.budget * view.tokens))
        return max(1, int(self.budget) // view.shards)

    @abstractmethod
    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection | None:
        """Choose about `keep` tokens of more."""
