"""RocketKV-MT, for texts of several turns: nothing is evicted, each prompt filters what the decode after it sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...cuda_kernels import top_k
from ..compress.choose import keep_best
from ..compress.scorers.snapkv import SnapKV
from ..compress.view import LayerView
from .rocket import Rocket, chunk_weights, split
from .selector import KeyView, Selection
from .summaries import Summaries

STAGE_ONE = SnapKV(window=32, kernel=63, pool="max")


@dataclass(frozen=True)
class RocketMT(Rocket):
    """Rocket's second stage over the tokens that its first stage would have kept, and those decoded since.

    Memory is not less. Where no prompt was seen (a sequence found whole in the store, a rank that holds a part of the
    sequence) all tokens stand before the second stage. Chunks are of the filtered tokens in their order.

    Source: RocketKV (arXiv 2502.14051), section 3.4.
    """

    name: ClassVar[str] = "rocket-mt"

    def queries(self, tokens: int) -> int:
        """The window of the first stage."""
        return STAGE_ONE.queries(tokens)

    def prompt(self, q: Tensor, view: KeyView) -> None:
        """Filter all that is cached, by the prompt's last queries."""
        view.own.clear()
        keep = self.keep(view)
        if view.shards > 1 or keep >= view.tokens:
            return
        count = split(view.tokens, keep, 0, view.keys.shape[-1]).kept
        keys = view.keys[view.pages.long()].flatten(0, 1)[: view.tokens].transpose(0, 1)
        seen = LayerView(keys[None], keys[None], q.transpose(0, 1)[None], layer=view.layer)
        # A later turn may be shorter than the window: then all of it votes.
        scores = replace(STAGE_ONE, window=len(q)).score(seen, count)[0]
        kept = torch.stack(keep_best(scores, torch.full((view.kv_heads,), count)))
        chunk, _ = self._stage(view, count, keep)
        rows = keys.gather(1, kept[:, :, None].expand(-1, -1, keys.shape[-1])).transpose(0, 1)
        view.own["kept"], view.own["since"] = kept, view.tokens
        view.own["ranges"] = Summaries.of_rows(view, rows, chunk)

    def choose(self, q: Tensor, view: KeyView, keep: int) -> Selection:
        """Tokens of the chunks with the greatest estimated weight, among the filtered ones."""
        kept = view.own.get("kept")
        if kept is None:
            return super().choose(q, view, keep)
        held = view.own["ranges"].extend(view)
        _, channels = self._stage(view, kept.shape[1], keep)
        chosen = top_k(chunk_weights(q, view, held, channels), max(1, keep // 2))
        since = torch.arange(view.own["since"], view.tokens).expand(view.kv_heads, -1)
        return Selection.of(torch.cat([kept, since], 1).gather(1, chosen), 1)
