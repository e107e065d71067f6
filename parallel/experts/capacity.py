"""Capacity: an upper bound on the rows of each expert, and which pairs of token and expert are dropped beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .route import numbers


@dataclass(frozen=True)
class Capacity:
    """At most ``ceil(tokens * top_k / experts * factor)`` rows for each expert; the others are dropped.

    Decided on all tokens that the ranks of a model copy hold alike, by every one of them: tp and kvp do not change
    what is dropped; cp and dp do, for their ranks see other tokens. Dropped pairs add nothing to a token, and its
    other weights stay what they are.

    Attributes:
        drop: ``probs`` keeps the largest weights, ``position`` those that come first (tokens in order).
    Source: MoE Parallel Folding (arXiv 2504.14960) section 3.3; a running count instead of a top-k over ties.
    """

    factor: float
    drop: str

    def rows(self, tokens: int, top_k: int, experts: int) -> int:
        """Rows that an expert takes at most."""
        return math.ceil(tokens * top_k / experts * self.factor)

    def kept(self, index: Tensor, weights: Tensor, experts: int, most: int | None = None) -> Tensor:
        """Replace the expert of every dropped pair by ``experts``, which is nobody. The host reads nothing.

        Args:
            most: rows that an expert takes; default what these tokens allow.

        Shape: index, weights [tokens, top_k] -> [tokens, top_k]
        """
        flat, order = index.reshape(-1), None
        if self.drop == "probs":
            order = torch.argsort(weights.detach().reshape(-1), descending=True, stable=True)
        number = numbers(flat, experts + 1, order)  # one more: nobody's pairs
        most = self.rows(index.shape[0], index.shape[1], experts) if most is None else most
        return torch.where(number < most, flat, experts).view_as(index)
