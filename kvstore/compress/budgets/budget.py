"""The budget contract: how many tokens each KV head of each layer keeps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...named import Named


@dataclass(frozen=True)
class Budget(Named):
    """A frozen value that spreads ``layers * kv_heads * keep`` tokens over the heads, layer by layer.

    A layer is asked for as soon as it has scores, so that a prompt's full cache never stands in memory at once. No
    head keeps more than there is; ``threshold`` keeps what is worth it, whatever ``keep`` says.

    Attributes:
        by_head: heads of one layer may get different numbers.
        by_layer: heads of one layer compete: it must see the scores of all of them.
        open: it may evict although `keep` would hold all.
    """

    by_head: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    open: ClassVar[bool] = False

    @property
    def newest(self) -> int:
        """Newest tokens that stay whatever they score."""
        return 0

    @abstractmethod
    def allot(self, score: Tensor, keep: int, layer: int, layers: int) -> Tensor:
        """Give each head of one layer its number of tokens.

        Args:
            score: `[kv_heads, tokens]`; ``inf`` marks what must stay.
            keep: tokens that a head keeps on average over all layers.

        Shape: -> `[kv_heads]` int64
        """


def shares(wishes: Tensor, total: int, most: int) -> Tensor:
    """Round wishes to whole numbers whose sum is `total`: by largest remainder, the lowest index first.

    Shape: `[n]` float64 -> `[n]` int64, each at most `most`.
    """
    total = min(total, most * wishes.numel())
    whole = wishes.clamp(0, most).floor().long()
    while (short := total - int(whole.sum())) > 0:  # again only where `most` cut a wish
        rest = torch.where(whole < most, wishes - whole, -torch.inf)
        open_ = min(short, int((whole < most).sum()))
        whole[rest.sort(descending=True, stable=True).indices[:open_]] += 1
    while (over := int(whole.sum()) - total) > 0:
        rest = torch.where(whole > 0, wishes - whole, torch.inf)
        open_ = min(over, int((whole > 0).sum()))
        whole[rest.sort(stable=True).indices[:open_]] -= 1
    return whole
