"""LagKV: tokens that differ from what follows them, without queries (arXiv 2504.04704)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..view import LayerView
from .scorer import KEEP, Scorer, wide


@dataclass(frozen=True)
class LagKV(Scorer):
    """Spread of K and V over channels, each channel in units of its range in the next `lag` tokens, ranked by run.

    Ranks are within a run of `lag` tokens, so every run loses the same share; the sinks and the last run stay.
    """

    lag: int = 128
    sinks: int = 4
    name: ClassVar[str] = "lagkv"

    def score(self, view: LayerView, keep: int) -> Tensor:
        """Rank in [0, 1) within the run; newer is better in a text too short for two runs."""
        runs = max(0, view.tokens - self.sinks) // self.lag
        shape = (*view.k.shape[:2], view.tokens)
        if runs < 2:
            age = torch.arange(view.tokens, dtype=torch.float32, device=view.k.device)
            score = (age / max(1, view.tokens)).repeat(*shape[:2], 1)
            score[..., : self.sinks] = KEEP
            return score
        spread = (self._spread(view.k, runs) + self._spread(view.v, runs)) / 2
        rank = spread.argsort(dim=-1, stable=True).argsort(-1).to(spread.dtype) / self.lag
        score = rank.new_full(shape, KEEP)
        score[..., self.sinks : self.sinks + (runs - 1) * self.lag] = rank.flatten(2)
        return score

    def _spread(self, x: Tensor, runs: int) -> Tensor:
        """Softmax over a run of the spread over channels. Shape: -> `[batch, kv_heads, runs - 1, lag]`."""
        x = wide(x[:, :, self.sinks : self.sinks + runs * self.lag]).unflatten(2, (runs, self.lag))
        low, high = x[:, :, 1:].amin(3, keepdim=True), x[:, :, 1:].amax(3, keepdim=True)
        # A channel without a range says nothing about its tokens; the reference divides by zero here.
        span = torch.where(high > low, high - low, torch.inf)
        return ((x[:, :, :-1] - low) / span).std(-1).softmax(-1)
