"""PyramidKV: early layers keep more, in a straight line (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .budget import Budget, shares


@dataclass(frozen=True)
class Pyramid(Budget):
    """From ``2 * rest - low`` tokens in the first layer to ``low = rest / beta`` in the last, beside the window.

    ``rest`` is what the budget leaves beside the window, which every layer keeps. The reference rounds each layer by
    itself and loses budget; here the sum is exact.
    """

    window: int = 64
    beta: float = 20.0
    name: ClassVar[str] = "pyramid"

    def __post_init__(self) -> None:
        if self.beta < 1 or self.window < 0:
            raise ValueError(f"{self}: beta must be at least 1 and window at least 0")

    def allot(self, score: Tensor, keep: int, layer: int, layers: int) -> Tensor:
        """A line over the layers, all heads of a layer alike."""
        heads, tokens = score.shape
        keep, window = min(keep, tokens), min(self.window, keep, tokens)
        rest, room = keep - window, tokens - window
        low = rest / self.beta
        high = 2 * rest - low
        if high > room:
            high, low = float(room), 2.0 * rest - room
        if layers == 1:
            high = float(rest)
        line = torch.linspace(high, low, layers, dtype=torch.float64)
        counts = shares(line, rest * layers, room)
        return (counts[layer] + window).repeat(heads)
