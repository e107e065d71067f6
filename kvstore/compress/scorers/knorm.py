"""Knorm: keys of small norm draw attention (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..view import LayerView
from .scorer import Scorer, wide


@dataclass(frozen=True)
class Knorm(Scorer):
    """Minus the length of the key."""

    name: ClassVar[str] = "knorm"

    def score(self, view: LayerView, keep: int) -> Tensor:
        """``-||k||``"""
        return -wide(view.k).norm(dim=-1)
