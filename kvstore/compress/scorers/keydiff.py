"""KeyDiff: keys unlike the others are kept (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..view import LayerView
from .scorer import Scorer, wide


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine of the key and the mean direction of all keys."""

    name: ClassVar[str] = "keydiff"

    def score(self, view: LayerView, keep: int) -> Tensor:
        """``-cos(k, mean(k / ||k||))``"""
        k = wide(view.k)
        anchor = F.normalize(k, dim=-1).mean(2, keepdim=True)
        return -F.cosine_similarity(k, anchor, dim=-1)
