"""Quest: pages whose keys might give the greatest dot products (arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...cuda_kernels import top_k
from .exact import newest_first
from .selector import Budgeted, KeyView, Selection
from .summaries import ranges

LEAST = 3  # pages, whatever the budget


@dataclass(frozen=True)
class Quest(Budgeted):
    """Bounds by each page's least and greatest value of every channel; the page of the newest token is always read.

    Args:
        page: tokens whose keys are summarised together; the pages of the store may be of another size.
        reduce: how the query heads of a KV head agree: "sum" of their bounds, or "max".
    """

    dense: int = 2
    page: int = 16
    reduce: str = "sum"
    name: ClassVar[str] = "quest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1 or self.reduce not in ("sum", "max"):
            raise ValueError(f"{self}: page must be at least 1 and reduce sum or max")

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection | None:
        """Pages by their bound."""
        held = ranges(view, self.page)
        count = max(LEAST, keep // self.page)
        if count >= held.units:
            return None
        rows = view.grouped(q)
        if self.reduce == "sum":  # of dot products: the dot product with the sum
            rows = rows.clamp(min=0).sum(1, keepdim=True), rows.clamp(max=0).sum(1, keepdim=True)
            bounds = held.products(*rows)[:, 0]
        else:
            bounds = held.bounds(rows).amax(1)
        return Selection.of(top_k(newest_first(bounds, 1), count), self.page)
