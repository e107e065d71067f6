"""The same number for every head of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .budget import Budget


@dataclass(frozen=True)
class Uniform(Budget):
    """``keep`` each."""

    name: ClassVar[str] = "uniform"

    def allot(self, score: Tensor, keep: int, layer: int, layers: int) -> Tensor:
        """``keep``, or all there is."""
        heads, tokens = score.shape
        return torch.full((heads,), min(keep, tokens))
