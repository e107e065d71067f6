"""SnapKV: what the end of the prompt attends to, smoothed over neighbours (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..view import LayerView, attention_received
from .scorer import KEEP, Scorer


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention received from the last `window` queries, pooled over `kernel` neighbours, averaged over the group.

    A question asked after the compression was in no window: expect its answer to be gone.

    Args:
        window: last tokens that vote; they are always kept. No more than the budget.
        kernel: odd width of the pooling; the edges count zeros beyond, as in the reference.
        pool: ``avg`` (each head, then the group's mean) or ``max`` (the group's sum, then max: RocketKV's).
    """

    window: int = 64
    kernel: int = 5
    pool: str = "avg"
    name: ClassVar[str] = "snapkv"
    private: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (
            self.pool not in ("avg", "max")
            or self.kernel % 2 == 0
            or min(self.window, self.kernel) < 1
        ):
            raise ValueError(
                f"{self}: window and kernel must be positive, kernel odd, pool avg or max"
            )

    @property
    def attends(self) -> bool:
        """Its votes are attention."""
        return True

    def queries(self, tokens: int) -> int:
        """The window."""
        return min(self.window, tokens)

    def score(self, view: LayerView, keep: int) -> Tensor:
        """Votes of the window; the window itself stays."""
        q = view.last_queries(min(self.window, max(keep, 1)), self.name, fewer=True)
        before = view.tokens - q.shape[2]
        votes = attention_received(view, q)[..., :before] / q.shape[2]
        if self.pool == "avg":  # pooling is linear: before the group's mean or after it
            votes = votes / (q.shape[1] // view.kv_heads)
        if before:
            pooled = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
            votes = pooled(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(votes, (0, view.tokens - before), value=KEEP)
