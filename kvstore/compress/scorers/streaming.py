"""StreamingLLM: the first tokens and the newest (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..view import LayerView
from .scorer import Scorer, protect


@dataclass(frozen=True)
class Streaming(Scorer):
    """Attention sinks and a recent window; positions stay as they were in the text."""

    sinks: int = 4
    name: ClassVar[str] = "streaming"
    joint: ClassVar[bool] = True
    every: ClassVar[int] = 16

    def score(self, view: LayerView, keep: int) -> Tensor:
        """Newer is better."""
        age = torch.arange(view.tokens, dtype=torch.float32, device=view.k.device)
        return protect(age.repeat(*view.k.shape[:2], 1), min(self.sinks, keep), 0)
