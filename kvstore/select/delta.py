"""DELTA: a few layers attend to everything and choose pages for the layers after them (arXiv 2510.09883)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...cuda_kernels import top_k
from .exact import newest_first
from .layers import Layers
from .selector import Budgeted, KeyView, Selection

PUBLISHED = Layers("0+1+2+14+22")  # for a distilled Qwen of 28 layers


@dataclass(frozen=True)
class Delta(Budgeted):
    """Pages by the attention they take, each token's the largest over all heads; one set for all heads.

    A layer of `full` whose successor is none of them chooses; its own attention is exact. The layers up to the next
    read what it chose.

    Args:
        full: layers that read everything, such as ``0+1+2+14+22``; it begins with layer 0.
        page: tokens of a page.
        newest: pages at the end that are always among them.
    """

    full: Layers = PUBLISHED
    page: int = 16
    newest: int = 8
    name: ClassVar[str] = "delta"
    across_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full[0] != 0 or min(self.page, self.newest) < 1:
            raise ValueError(
                f"{self}: full must begin with layer 0; page and newest must be at least 1"
            )

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection | None:
        """Choose for others, or read what was chosen."""
        if view.layer not in self.full:
            return followed(view, self.full)
        if self.full.leads(view.layer, view.layers):
            pages = self._pages(q, view, max(1, keep // self.page))
            lists = pages.expand(view.kv_heads, -1)
            view.own["chosen"] = (view.tokens, Selection.of(lists, self.page))
        return None

    def _pages(self, q: Tensor, view: KeyView, count: int) -> Tensor:
        weights = (view.logits(view.grouped(q)) * view.scale).softmax(-1).amax((0, 1))
        missing = -len(weights) % self.page
        mass = F.pad(weights, (0, missing)).view(1, -1, self.page).sum(-1)
        return top_k(newest_first(mass, self.newest), min(count, mass.shape[1]))


def followed(view: KeyView, full: Layers) -> Selection:
    """What the last full layer chose in this step.

    Raises:
        RuntimeError: if it has not run.
    """
    leader = full.leader(view.layer)
    tokens, chosen = view.memory.get(-1 if leader is None else leader, {}).get("chosen", (-1, None))
    if tokens != view.tokens or chosen is None:
        raise RuntimeError(
            f"layer {view.layer} reads what layer {leader} chose, which has not run in this step; run layers in order"
        )
    return chosen
