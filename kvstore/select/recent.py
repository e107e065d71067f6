"""The newest tokens: what any other selector must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .selector import KeyView, Selection, Selector


@dataclass(frozen=True)
class Recent(Selector):
    """The newest `tokens` tokens of the sequence, whatever is asked."""

    tokens: int = 512
    name: ClassVar[str] = "recent"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"{self}: at least one token must be read")

    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        """The end of the sequence; this rank's share of it."""
        keep = max(1, self.tokens // view.shards)
        if keep >= view.tokens:
            return None
        newest = torch.arange(view.tokens - keep, view.tokens)
        return Selection.of(newest.repeat(view.kv_heads, 1), 1)
