"""One layer of one sequence: score its tokens and say which of them each head keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .budgets import Widths
from .choose import keep_best
from .compression import Compression
from .rotary import Rotary
from .scorers import KEEP
from .shard import Shard
from .view import LayerView


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What some scorers must know of the model.

    Shape: outputs: of each layer the weight of the output projection, `[hidden, heads * value_dim]`.
    """

    rotary: Rotary | None = None
    outputs: tuple[Tensor, ...] = ()


@dataclass
class Heads:
    """Tokens of one layer, head by head; heads may have different ones.

    Shape: k, v `[kv_heads, tokens, d]`, or lists of `[tokens, d]` where heads differ; positions in the text
        `[kv_heads]` of `[tokens]`; received likewise, or None.
    """

    k: Tensor | list[Tensor]
    v: Tensor | list[Tensor]
    positions: list[np.ndarray]
    received: list[Tensor] | None = None
    scores: list[Tensor] | None = None
    levels: list[Tensor] | None = None  # of each token, see `Budget.levels`
    gathered: bool = False  # from all kvp ranks

    def squared(self) -> Heads:
        """The same, as whole tensors if all heads hold the same tokens."""
        first = self.positions[0]
        if isinstance(self.k, Tensor) or not all(
            np.array_equal(own, first) for own in self.positions[1:]
        ):
            return self
        return replace(self, k=torch.stack(self.k), v=torch.stack(list(self.v)))

    def take(self, kept: list[Tensor]) -> Heads:
        """Some tokens of each head."""
        heard = None if self.received is None else _pick(self.received, kept)
        scores = None if self.scores is None else _pick(self.scores, kept)
        levels = None if self.levels is None else _pick(self.levels, kept)
        where = [own[index.numpy()] for own, index in zip(self.positions, kept, strict=True)]
        k, v = _pick(self.k, kept), _pick(self.v, kept)
        return Heads(k, v, where, heard, scores, levels, self.gathered)


def _pick(rows: Tensor | list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    return [rows[head][index.to(rows[head].device)] for head, index in enumerate(kept)]


@dataclass(frozen=True)
class Chooser:
    """Chooses for the layers of one store."""

    layers: int
    facts: ModelFacts
    shard: Shard
    widths: Widths | None = None

    @torch.no_grad()  # a step may be committed, and tokens chosen, where gradients are on
    def choose(self, heads: Heads, q: Tensor, what: Compression, layer: int, keep: int) -> Heads:
        """The tokens that each head keeps, in the order of the text, with their scores.

        Args:
            heads: all tokens of this rank's heads, of all kvp ranks.
            keep: tokens a head keeps on average.

        Shape: q `[queries, heads, head_dim]` of the newest tokens
        Collective: over tp where heads compete or keep the same; `tokens * kv_heads` scores.
        """
        for own in heads.k:
            if not bool(own.sum(dtype=torch.promote_types(own.dtype, torch.float32)).isfinite()):
                raise ValueError(
                    f"layer {layer}: keys hold NaN or infinity, so a score is NaN or means nothing; look at the "
                    "model's input and precision, and close the sequence"
                )
        scores = self._scores(heads, q, what, layer, keep)
        for own in scores:
            if what.rule.newest:
                own[max(0, len(own) - what.rule.newest) :] = KEEP
        scores = [what.rule.weigh(own, v) for own, v in zip(scores, heads.v, strict=True)]
        if what.scorer.joint:
            scores = self.shard.mean_over_heads(scores)
        whole, mine = self.shard.all_heads(scores) if what.rule.by_layer else (scores, slice(None))
        width = max(len(own) for own in whole)
        padded = torch.full((len(whole), width), -torch.inf, dtype=whole[0].dtype)
        for row, own in zip(padded, whole, strict=True):
            row[: len(own)] = own
        levels = None
        if what.rule.by_loss and self.widths is not None:
            levels = what.rule.levels(padded, keep, self.widths)
            counts = (levels > 0).sum(1)
        else:
            counts = what.rule.allot(padded, keep, layer, self.layers)
        counts = torch.minimum(counts, torch.tensor([len(own) for own in whole]))
        kept = keep_best(padded[mine], counts[mine])
        of = None if levels is None else list(levels[mine].unbind(0))
        return replace(heads, scores=list(padded[mine].unbind(0)), levels=of).take(kept)

    def _scores(
        self, heads: Heads, q: Tensor, what: Compression, layer: int, keep: int
    ) -> list[Tensor]:
        """Scores of each head's tokens, on the host."""
        count, total = len(heads.positions), len(heads.positions) * self.shard.tp_size
        first, group = len(heads.positions) * self.shard.tp_rank, q.shape[1] // count
        output = self.facts.outputs[layer] if self.facts.outputs else None
        rows = q.transpose(0, 1)[None]  # [1, heads, queries, head_dim]

        def view(some: slice, k: Tensor, v: Tensor, heard: Tensor | None) -> LayerView:
            own, width = slice(some.start * group, some.stop * group), v.shape[-1]
            columns = own
            if output is not None and output.shape[1] == total * group * width:  # of all tp ranks
                columns = slice(own.start + first * group, own.stop + first * group)
            columns = slice(columns.start * width, columns.stop * width)
            return LayerView(
                k[None], v[None], rows[:, own], torch.from_numpy(heads.positions[some.start]),
                layer, self.layers, self.facts.rotary, None if output is None else output[:, columns],
                None if heard is None else heard[None], first + some.start, total,
            )  # fmt: skip

        if isinstance(heads.k, Tensor) and isinstance(heads.v, Tensor):
            heard = None if heads.received is None else torch.stack(heads.received)
            all_ = view(slice(0, count), heads.k, heads.v, heard)
            return list(what.scorer.score(all_, keep)[0].cpu().unbind(0))
        out = []
        for head in range(count):
            heard = None if heads.received is None else heads.received[head][None]
            alone = slice(head, head + 1)
            own = view(alone, heads.k[head][None], heads.v[head][None], heard)
            out.append(what.scorer.score(own, keep)[0, 0].cpu())
        return out
