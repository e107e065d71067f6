"""The budget contract: how many tokens each KV head of each layer keeps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...named import Named


class Widths(NamedTuple):
    """What tokens may take, the least first: bytes of a page, of which there are `elements`.

    Attributes:
        whole: bytes of a page as it came, the unit of a budget.
    """

    costs: tuple[int, ...]
    elements: int
    whole: int


@dataclass(frozen=True)
class Budget(Named):
    """A frozen value that spreads ``layers * kv_heads * keep`` tokens over the heads, layer by layer.

    A layer is asked for as soon as it has scores, so that a prompt's full cache never stands in memory at once. No
    head keeps more than there is; ``threshold`` keeps what is worth it, whatever ``keep`` says.

    Attributes:
        by_head: heads of one layer may get different numbers.
        by_layer: heads of one layer compete: it must see the scores of all of them.
        open: it may evict although `keep` would hold all.
        by_loss: it reads scores as attention, and gives tokens widths (`levels`), not only heads numbers.
    """

    by_head: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    open: ClassVar[bool] = False
    by_loss: ClassVar[bool] = False

    @property
    def newest(self) -> int:
        """Newest tokens that stay whatever they score."""
        return 0

    def weigh(self, score: Tensor, values: Tensor) -> Tensor:
        """What it ranks a head's tokens by. Shape: `[tokens]`, `[tokens, value_dim]` -> `[tokens]`"""
        return score

    def levels(self, score: Tensor, keep: int, widths: Widths) -> Tensor:
        """Give each token a width: 0 is none, ``n`` the n-th of `widths`.

        Shape: `[kv_heads, tokens]` -> the same, int64
        """
        raise NotImplementedError

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
