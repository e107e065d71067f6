"""TriAttention: distances at which a head's queries look, from their trigonometric mean (2026, for long reasoning)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..rotary import Rotary
from ..view import LayerView, grouped
from .scorer import Scorer, protect, wide

DISTANCES = tuple(1 << i for i in range(17))  # 1, 2, 4 ... 65,536 tokens ahead


@dataclass(frozen=True, eq=False)
class QueryMeans:
    """What calibration knows of the queries of one layer before rotation, per head and frequency.

    Shape: mean `[heads, frequencies]` complex, size `[heads, frequencies]` (the mean of the absolute values).
    """

    mean: Tensor
    size: Tensor

    @classmethod
    def of(cls, q: Tensor, positions: Tensor, rotary: Rotary) -> QueryMeans:
        """Average the queries of a calibration text. Shape: q `[batch, heads, n, head_dim]`, rotated."""
        plain = as_complex(rotary.undo(wide(q), positions), rotary)
        return cls(plain.mean((0, 2)), plain.abs().mean((0, 2)))


@dataclass(frozen=True, eq=False)
class TriAttention(Scorer):
    """Expected logit at distances ahead, from the queries' mean; plus what their spread adds.

    With a key ``k_f`` at position p before rotation, and the text at position r:
    ``mean over delta of sum_f |m_f||k_f| cos(w_f (r - p + delta) + arg(m_f conj k_f)) + sum_f (a_f - |m_f|) |k_f|``,
    normalised over the tokens by mean and deviation in each head, the group's mean.

    Args:
        means: of each layer, from `QueryMeans.of` on a calibration text.
        recent: newest tokens, which stay.
    """

    means: tuple[QueryMeans, ...] = ()
    recent: int = 128
    name: ClassVar[str] = "triattention"
    every: ClassVar[int] = 128

    def unmet(self, rotary: bool, outputs: int, layers: int) -> str | None:
        """The rotary embedding, and means of every layer."""
        if len(self.means) < layers:
            return f"calibrated means of all {layers} layers, not {len(self.means)}"
        return None if rotary else "a rotary embedding of the usual kind"

    def score(self, view: LayerView, keep: int) -> Tensor:
        """The z-scored sum."""
        if view.rotary is None or view.positions is None or len(self.means) <= view.layer:
            raise ValueError(
                "triattention: needs the model's rotary embedding, positions, and calibrated means of every layer"
            )
        group = self.means[view.layer].mean.shape[0] // view.all_kv_heads
        heads = slice(view.first_head * group, (view.first_head + view.kv_heads) * group)
        own, rotary = self.means[view.layer], view.rotary
        k = as_complex(rotary.undo(wide(view.k), view.positions), rotary)
        now = int(view.positions[-1]) + 1
        ahead = torch.tensor(DISTANCES, device=k.device) + now
        distance = (ahead[None] - view.positions[:, None]).double()  # [tokens, distances]
        turns = torch.exp(1j * distance[..., None] * rotary.frequencies.double())
        mean_turn = turns.mean(1).to(k.dtype)  # [tokens, frequencies]
        mean, size = (
            grouped(x[None], view.kv_heads) for x in (own.mean[heads].to(k.dtype), own.size[heads])
        )
        toward = torch.einsum("bhgf,bhtf,tf->bhgt", mean, k.conj(), mean_turn).real
        spread = torch.einsum("bhgf,bhtf->bhgt", size - mean.abs(), k.abs())
        score = toward + spread
        score = (score - score.mean(-1, keepdim=True)) / score.std(-1, keepdim=True).clamp_min(
            1e-12
        )
        return protect(score.mean(2), 0, min(self.recent, keep))


def as_complex(x: Tensor, rotary: Rotary) -> Tensor:
    """See rotated dims as complex numbers, one per frequency. Shape: `[..., head_dim]` -> `[..., frequencies]`."""
    half = rotary.width // 2
    return torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous())
