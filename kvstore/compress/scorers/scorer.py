"""The scorer contract: how much each token of a cache matters to each KV head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...named import Named
from ..view import LayerView

KEEP = float("inf")  # the score of a token that must stay


@dataclass(frozen=True)
class Scorer(Named):
    """A frozen value whose options stand in its text form; the higher the score, the sooner a token is kept.

    ``private`` says that scores depend on the request's own queries: pages so chosen serve this request only.
    """

    private: ClassVar[bool] = False

    def queries(self, tokens: int) -> int:
        """How many of the last queries it must see."""
        return 0

    @abstractmethod
    def score(self, view: LayerView, keep: int) -> Tensor:
        """Score each token of each KV head; ``inf`` for those that must stay.

        Args:
            keep: tokens a head keeps on average, for those who spend a part of them by another rule.

        Shape: -> `[batch, kv_heads, tokens]`, float32 or float64.
        """


def wide(x: Tensor) -> Tensor:
    """At least float32: in bfloat16 most scores of a head would tie."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def protect(score: Tensor, first: int, last: int) -> Tensor:
    """Mark the first and the last tokens as to be kept, in place."""
    score[..., :first] = KEEP
    score[..., max(0, score.shape[-1] - last) :] = KEEP
    return score
