"""Exact top-k: the tokens that take the most attention, found by asking every key; the oracle of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...cuda_kernels import top_k
from .selector import Budgeted, KeyView, Selection


@dataclass(frozen=True)
class Exact(Budgeted):
    """The greatest of the attention weights, summed over the query heads of a KV head.

    All keys are read, values only of what is chosen. The choice of the step before is the hint of the next.
    """

    name: ClassVar[str] = "exact"

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection:
        """Tokens by their weight."""
        weights = view.logits(view.grouped(q) * view.scale).softmax(-1).sum(1)
        return best_tokens(weights, keep, view)


def best_tokens(scores: Tensor, keep: int, view: KeyView) -> Selection:
    """The `keep` best tokens of each KV head, near those of the step before if there was one.

    Shape: scores `[kv_heads, tokens]`
    """
    held = view.own.get("chosen")
    hint = held if isinstance(held, Tensor) and len(held) == len(scores) else None
    view.own["chosen"] = chosen = top_k(scores, keep, hint)
    return Selection.of(chosen, 1)


def newest_first(scores: Tensor, count: int) -> Tensor:
    """Let the last units go before all others, in place. Shape: `[kv_heads, units]`"""
    scores[:, max(0, scores.shape[1] - count) :] = torch.inf
    return scores
