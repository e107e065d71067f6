"""RocketKV: keep less of the prompt, then read a part of that (arXiv 2502.14051).

Stage one is a scorer, ``snapkv:window=32,kernel=63,pool=max``, with the budget `split` gives; stage two is `Rocket`.
`RocketMT` is for texts of several turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from ...cuda_kernels import top_k
from .selector import Budgeted, KeyView, Selection
from .sparq import loudest, temper
from .summaries import Summaries, ranges


class Split(NamedTuple):
    """How a budget is spent: `prompt` tokens of the prompt stay, `chunk` and `channels` find `read` of them a step."""

    prompt: int
    kept: int
    chunk: int
    channels: int
    read: int


def split(tokens: int, budget: int, new: int, head_dim: int) -> Split:
    """Split the compression of `tokens` (prompt and `new` generated ones) to `budget` over both stages.

    Source: RocketKV section 3.2: of the ratio c, ``c ** min(0.2 + 0.06 log2 c, 0.8)`` falls to stage one.
    """
    ratio = max(1.0, tokens / budget)
    kept = int(tokens / ratio ** min(0.2 + 0.06 * math.log2(ratio), 0.8))
    kept = max(kept, min(2 * new, tokens))
    return Split(kept - new, kept, *second_stage(kept, budget, head_dim), max(1, budget // 2))


def second_stage(kept: int, budget: int, head_dim: int) -> tuple[int, int]:
    """Share what is left of the ratio equally between tokens summarised together and channels not looked at."""
    ratio = max(1.0, kept / budget)
    chunk = math.ceil(math.sqrt(ratio))
    chunk = chunk if chunk <= ratio else 1
    return chunk, min(head_dim, max(1, int(head_dim * chunk / ratio)))


@dataclass(frozen=True)
class Rocket(Budgeted):
    """Chunks scored by their ranges in some channels; half of the budget pays for that, half is read.

    In each channel the greatest key value counts where the query heads' sum is positive, else the least: for heads
    whose signs differ that is no bound. Chunk and channels are chosen when the first token is decoded, and stay.

    Args:
        chunk, channels: instead of what the budget gives.
    """

    chunk: int = 0
    channels: int = 0
    name: ClassVar[str] = "rocket"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 0 or self.channels < 0:
            raise ValueError(
                f"{self}: chunk and channels must be at least 1, or 0 for the paper's choice"
            )

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection:
        """Tokens of the chunks with the greatest estimated weight."""
        chunk, channels = self._stage(view, view.tokens, keep)
        weights = chunk_weights(q, view, ranges(view, chunk), channels)
        return Selection.of(top_k(weights, max(1, keep // 2)), 1)

    def _stage(self, view: KeyView, kept: int, keep: int) -> tuple[int, int]:
        if "stage" not in view.own:
            chunk, channels = second_stage(kept, keep, view.keys.shape[-1])
            view.own["stage"] = (self.chunk or chunk, self.channels or channels)
        return view.own["stage"]


def chunk_weights(q: Tensor, view: KeyView, held: Summaries, channels: int) -> Tensor:
    """Estimate each token's attention weight by its chunk's, the group's sum. Shape: -> `[kv_heads, tokens]`"""
    rows = view.grouped(q)
    few = loudest(rows, channels)
    up = few * (rows.sum(1, keepdim=True) > 0)
    logits = held.products(up, few - up) * temper(rows, few, view.scale)
    sizes = held.sizes()
    weights = (logits + sizes.log()).softmax(-1).sum(1) / sizes
    return weights.repeat_interleave(sizes, -1)
