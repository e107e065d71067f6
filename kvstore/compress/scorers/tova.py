"""TOVA: what the newest query attends to (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..view import LayerView, attention_rows
from .scorer import Scorer, protect


@dataclass(frozen=True)
class Tova(Scorer):
    """Attention of the last query, averaged over all heads of the layer; all KV heads keep the same tokens."""

    name: ClassVar[str] = "tova"
    private: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    every: ClassVar[int] = 16

    @property
    def attends(self) -> bool:
        """The newest query's attention."""
        return True

    def queries(self, tokens: int) -> int:
        """The newest."""
        return 1

    def score(self, view: LayerView, keep: int) -> Tensor:
        """Mean over heads of one attention row; the newest token stays."""
        row = attention_rows(view, view.last_queries(1, self.name))
        shared = row.mean((1, 2))  # [batch, 1, tokens]
        return protect(shared.repeat(1, view.kv_heads, 1), 0, 1)
