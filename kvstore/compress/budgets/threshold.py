"""A threshold: keep what scores at least tau, however many that are (the rule of KVzap and DMS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .budget import Budget


@dataclass(frozen=True)
class Threshold(Budget):
    """Tokens below ``tau`` go once they are older than ``window`` tokens. The average budget is not looked at."""

    tau: float = 0.0
    window: int = 128
    name: ClassVar[str] = "threshold"
    by_head: ClassVar[bool] = True
    open: ClassVar[bool] = True

    @property
    def newest(self) -> int:
        """The window."""
        return self.window

    def allot(self, score: Tensor, keep: int, layer: int, layers: int) -> Tensor:
        """Count what is worth it."""
        worth = score >= self.tau
        worth[:, max(0, score.shape[1] - self.window) :] = True
        return worth.sum(1).cpu()
