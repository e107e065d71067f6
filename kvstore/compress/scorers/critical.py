"""CriticalKV: any scorer, but half the budget goes by what values do to the output (arXiv 2502.03805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..choose import order
from ..view import LayerView, grouped
from .scorer import KEEP, Scorer, wide
from .snapkv import SnapKV


@dataclass(frozen=True)
class Critical(Scorer):
    """The base's best take `first` of the budget; the others are ranked by ``(score + epsilon) * ||W_o v||_1``."""

    base: Scorer = SnapKV()  # noqa: RUF009 (a frozen value)
    first: float = 0.5
    epsilon: float = 1e-4
    name: ClassVar[str] = "critical"
    private: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.base.joint or not 0 <= self.first <= 1:
            raise ValueError(
                f"{self}: first is a share of the budget, 0 to 1; and {self.base.name}, which keeps the same tokens "
                "in all heads, has no heads to rank apart"
                if self.base.joint
                else f"{self}: first must be 0 to 1"
            )

    def queries(self, tokens: int) -> int:
        """The base's."""
        return self.base.queries(tokens)

    @property
    def prompts_only(self) -> bool:
        """The base's; a sum of attention is not handed down."""
        return self.base.prompts_only or self.base.received

    def unmet(self, rotary: bool, outputs: int, layers: int) -> str | None:
        """Every layer's output projection, and what the base must know."""
        if outputs < layers:
            return "the output projection of every layer"
        return self.base.unmet(rotary, outputs, layers)

    def score(self, view: LayerView, keep: int) -> Tensor:
        """Scores in two stages."""
        score = self.base.score(view, keep)
        sure = max(1, int(keep * self.first)) if self.first > 0 else 0
        ranked = (score + self.epsilon) * output_norm(view)
        best = order(score)[..., :sure]
        return ranked.scatter(-1, best, KEEP)


def output_norm(view: LayerView) -> Tensor:
    """L1 norm of what each value adds to the layer's output, the group's mean. Shape: -> `[batch, kv_heads, tokens]`.

    Raises:
        ValueError: if the output projection is not known.
    """
    if view.output is None:
        raise ValueError("critical: needs the weight of the layer's output projection")
    v = wide(view.v)
    width = v.shape[-1]
    heads = view.output.shape[1] // width
    by_head = view.output.to(v.dtype).T.unflatten(0, (heads, width))  # [heads, value_dim, hidden]
    own = torch.arange(heads, device=v.device) // (heads // view.kv_heads)
    norms = [  # one head at a time: all at once would be hidden / value_dim times the values
        (v[:, kv] @ by_head[h]).abs().sum(-1) for h, kv in enumerate(own.tolist())
    ]
    return grouped(torch.stack(norms, 1), view.kv_heads).mean(2)
