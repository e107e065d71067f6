"""SparQ: attention estimated with the channels in which the query is large (arXiv 2312.04985)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .exact import best_tokens, newest_first
from .selector import Budgeted, KeyView, Selection


@dataclass(frozen=True)
class SparQ(Budgeted):
    """Weights by `channels` channels of each key, tempered for what they leave out; the group's sum decides.

    The mean value that the paper adds for what is not read is left out: it is wrong where KV heads are shared, and
    outputs could not be merged over ranks. Keys lie token by token here, so whole rows pass through the cache although
    few channels of them count; the paper keeps a second copy of the keys, channel by channel, to read less.

    Args:
        channels: of a head that are looked at.
        window: newest tokens, read always.
    """

    channels: int = 32
    window: int = 16
    name: ClassVar[str] = "sparq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.window < 1:
            raise ValueError(f"{self}: channels and window must be at least 1")

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection:
        """Tokens by their estimated weight."""
        rows = view.grouped(q)
        few = loudest(rows, self.channels)
        weights = view.logits(few * temper(rows, few, view.scale)).softmax(-1).sum(1)
        return best_tokens(newest_first(weights, min(self.window, keep)), keep, view)


def loudest(q: Tensor, channels: int) -> Tensor:
    """Keep the channels in which the query heads of a KV head are largest together, the others zero.

    Shape: `[kv_heads, group, head_dim]`
    """
    size = q.abs().sum(1)
    kept = size.sort(dim=-1, descending=True, stable=True).indices[:, :channels]
    return q * torch.zeros_like(size).scatter(1, kept, 1.0)[:, None]


def temper(q: Tensor, few: Tensor, scale: float) -> Tensor:
    """What logits of some channels are multiplied with: ``scale / sqrt(|few| / |q|)``, by sums of absolute values.

    Shape: -> `[kv_heads, group, 1]`
    """
    whole, part = (x.abs().sum(-1, keepdim=True) for x in (q, few))
    return scale * torch.where(part > 0, whole / part, 1.0).sqrt()
