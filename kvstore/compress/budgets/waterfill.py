"""RDKV: the bits of a layer go where they lessen distortion most; who gets none is evicted (2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .budget import Budget, Widths


@dataclass(frozen=True)
class WaterFill(Budget):
    """Reverse water-filling over the tokens of all heads of a layer: ``b = max(0, log2(w s^2 / theta) / 2)``.

    An error in a token's value enters the output times the token's attention, so ``w`` is the square of its score
    and ``s`` the root mean square of its value. ``b`` is one of the widths that the store's codec tiers offer, bits
    with their scales, and ``theta`` such that the budget, counted in tokens as they came, is spent: `keep` of them
    may become four times as many in a quarter of the bits. Without a codec a token stays or goes.

    The paper's rule by layer: a layer's tokens are gone before the next one's are there. Its weights were not to be
    had; these are ours.
    """

    name: ClassVar[str] = "waterfill"
    by_head: ClassVar[bool] = True
    by_layer: ClassVar[bool] = True
    by_loss: ClassVar[bool] = True

    def weigh(self, score: Tensor, values: Tensor) -> Tensor:
        """Distortion that losing each token causes. Shape: `[tokens]`, `[tokens, value_dim]` -> `[tokens]`"""
        size = values.to(score.device, score.dtype).square().mean(-1)
        return score.square() * size.masked_fill(score.isinf(), 1.0)

    def allot(self, score: Tensor, keep: int, layer: int, layers: int) -> Tensor:
        """Tokens of each head, where each takes as much as any other."""
        return (self.levels(score, keep, Widths((1,), 1, 1)) > 0).sum(1)

    def levels(self, score: Tensor, keep: int, widths: Widths) -> Tensor:
        """Fill a layer's budget. Shape: score `[kv_heads, tokens]`, -inf where there is no token."""
        level = fill(score.flatten(), keep * len(score) * widths.whole, widths)
        return level.view(score.shape).cpu()


def fill(weights: Tensor, total: int, widths: Widths) -> Tensor:
    """Spend `total` on steps from width to width, the one that saves most for its cost first.

    Distortion falls as ``w 4^-b`` with ``b`` in proportion to the cost, so the steps of a token come in their order.
    Where a step is too dear for what is left, the next that is not is taken, so that nothing affordable is left.

    Shape: weights `[n]` -> `[n]` int64 in ``0 .. len(widths.costs)``
    """
    price = torch.tensor((0, *widths.costs), dtype=torch.float64, device=weights.device)
    left_over = 4.0 ** -(8 * price / widths.elements)
    saved = -left_over.diff() / price.diff()
    there = weights > -torch.inf
    gain = torch.where(there, weights.double(), -torch.inf)[None] * saved[:, None]  # [steps, n]
    order = gain.flatten().sort(descending=True, stable=True).indices
    order = order[there.repeat(len(saved))[order]]
    cost, count = price.diff().long(), weights.numel()
    spent = cost[order // count].cumsum(0)
    taken = int((spent <= total).sum())
    left = total - int(spent[taken - 1]) if taken else total
    level = torch.bincount(order[:taken] % count, minlength=count)
    for item in _affordable(order[taken:], cost, count, level, left):
        level[item] += 1
    return level


def _affordable(order: Tensor, cost: Tensor, count: int, level: Tensor, left: int) -> list[int]:
    """Tokens that take one more step each of what is left, in order; `level` is what they have before."""
    found: list[int] = []
    have = level.clone()
    while True:
        step, token = order // count, order % count
        fits = (cost[step] <= left) & (have[token] == step)
        if not bool(fits.any()):
            return found
        at = int(fits.nonzero()[0])
        found.append(int(token[at]))
        left -= int(cost[step[at]])
        have[found[-1]] += 1
