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

    Attributes:
        private: scores depend on the request's own queries: pages so chosen serve this request only.
        joint: all heads of a layer keep the same tokens.
        received: it scores by the attention that tokens received so far (`LayerView.received`).
        waits: prompts are kept whole until it is told to choose (`CompressedStore.choose`).
        every: tokens decoded after which it is usual to score again; 0 if it is made for prompts.
    """

    private: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    received: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    every: ClassVar[int] = 0

    def queries(self, tokens: int) -> int:
        """How many of the last queries it must see."""
        return 0

    @property
    def attends(self) -> bool:
        """Whether scores are attention, what an error of a token's value is multiplied with."""
        return False

    @property
    def prompts_only(self) -> bool:
        """Whether it needs every query of the text, which only a prompt's forward has."""
        return self.queries(1 << 40) == 1 << 40 and not self.received

    def unmet(self, rotary: bool, outputs: int, layers: int) -> str | None:
        """What it must know of a model and is not told, in words; see `ModelFacts`.

        Args:
            rotary: the rotary embedding is known; outputs: of so many layers the output projection is.
        """
        return None

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
