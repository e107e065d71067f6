"""H2O: tokens that received much attention so far, and the newest (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..view import LayerView, attention_columns
from .scorer import Scorer, protect


@dataclass(frozen=True)
class H2O(Scorer):
    """Attention summed over all queries of the prompt, in float32; the newest tokens take a share of the budget.

    The sum favours early tokens, which more queries saw; that is the method. It needs every query and reads all
    pairs once more; while decoding the sum goes on (`LayerView.received`), and what is evicted never returns.
    """

    recent: float = 0.5
    name: ClassVar[str] = "h2o"
    private: ClassVar[bool] = True
    received: ClassVar[bool] = True
    every: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise ValueError(f"h2o: recent={self.recent} is a share of the budget; use 0 to 1")

    @property
    def attends(self) -> bool:
        """It sums attention."""
        return True

    def queries(self, tokens: int) -> int:
        """All."""
        return tokens

    def score(self, view: LayerView, keep: int) -> Tensor:
        """The group's mean of the column sums."""
        columns = view.received
        if columns is None:
            columns = attention_columns(view, view.last_queries(view.tokens, self.name)).mean(2)
        return protect(columns.clone(), 0, int(keep * self.recent))
