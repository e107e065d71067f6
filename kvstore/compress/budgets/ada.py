"""AdaKV: heads of a layer compete for its budget (arXiv 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..choose import order
from .budget import Budget


@dataclass(frozen=True)
class Ada(Budget):
    """Each head keeps its best ``floor * keep``; what is left goes to the best of the layer, whichever head's.

    Scores of heads are compared as they are, so the scorer must give them one unit (attention does). The budget of a
    layer is kept to the token, which rounding by head does not.
    """

    floor: float = 0.2
    name: ClassVar[str] = "ada"
    by_head: ClassVar[bool] = True
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"ada: floor={self.floor} is a share of the budget; use 0 to 1")

    def allot(self, score: Tensor, keep: int, layer: int, layers: int) -> Tensor:
        """Count what each head has among the best of its layer."""
        heads, tokens = score.shape
        keep = min(keep, tokens)
        sure = min(keep, max(int(keep * self.floor), 1 if self.floor > 0 else 0))
        best = order(score)[:, :sure]
        lifted = score.scatter(1, best, torch.inf).flatten()
        chosen = order(lifted[None])[0, : heads * keep]
        return torch.bincount(chosen.cpu() // tokens, minlength=heads)
