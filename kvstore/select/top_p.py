"""Top-p: as many tokens as hold a share of the attention, found in two stages (after Double-P, 2026)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .selector import KeyView, Selection, Selector
from .summaries import sums


@dataclass(frozen=True)
class TopP(Selector):
    """Pages by the mass that their mean key and size suggest, then tokens of these by their own.

    The first stage takes pages up to `pages` of the estimated mass, the second tokens of them up to `share` of what
    these hold; each for the mean of the group's weights. How much is read follows how spread attention is. The mean
    key understates a page whose keys differ, so the estimate is no bound.

    Args:
        share: of the attention mass, in (0, 1]; 1 reads all that the first stage took.
        pages: of the estimated mass, in (0, 1]; 1 reads everything.
        page: tokens of a page.
        dense: layers at the bottom that read everything.
    """

    share: float = 0.95
    pages: float = 0.98
    page: int = 16
    dense: int = 0
    name: ClassVar[str] = "top-p"

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.pages <= 1) or self.page < 1 or self.dense < 0:
            raise ValueError(
                f"{self}: share and pages are in (0, 1], page at least 1, dense at least 0"
            )

    def plan(self, q: Tensor, view: KeyView) -> Selection | None:
        """Tokens that hold the share."""
        if view.layer < self.dense or self.pages == 1 or view.tokens <= self.page:
            return None
        rows, held = view.grouped(q) * view.scale, sums(view, self.page)
        sizes = held.sizes()
        mass = (held.products(rows) / sizes + sizes.log()).softmax(-1).mean(1)
        taken = reaching(mass, self.pages)
        taken[:, -1] = True  # the newest token's
        tokens = taken.repeat_interleave(sizes, -1)
        logits = _some_logits(rows, view, tokens)
        weights = logits.softmax(-1).mean(1)
        return Selection.where(reaching(weights, self.share) & tokens, 1)


def reaching(mass: Tensor, share: float) -> Tensor:
    """Say which units are the fewest that hold a share of the mass; of equal ones the lowest.

    Shape: `[kv_heads, units]` -> likewise, bool
    """
    order = mass.sort(dim=-1, descending=True, stable=True)
    total = order.values.cumsum(-1)
    before = total - order.values
    # By what stands before each: the first is always in, and rounding of the sum takes none away.
    inside = before < share * total[:, -1:] if share < 1 else before <= math.inf
    return torch.zeros_like(inside).scatter(1, order.indices, inside)


def _some_logits(rows: Tensor, view: KeyView, tokens: Tensor) -> Tensor:
    """Logits of some tokens, -inf for the others. Shape: rows `[kv_heads, group, d]`, tokens `[kv_heads, tokens]`"""
    logits = rows.new_full((*rows.shape[:2], view.tokens), -torch.inf)
    for head, own in enumerate(tokens):
        at = own.nonzero().flatten()
        logits[head][:, at] = rows[head] @ view.rows(head, at).to(rows.dtype).T
    return logits
