"""Expected attention: what queries still to come would attend to (arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rotary import Rotary
from ..view import LayerView, grouped
from .scorer import KEEP, Scorer, wide


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Mean attention under queries drawn like the prompt's, rotated to the next positions, times the value's norm.

    For queries ~ N(mu, Sigma): ``E[exp(q k / sqrt d)] = exp(k mu / sqrt d + k Sigma k / 2d)``.

    Args:
        future: positions ahead over which the rotation is averaged.
        sinks: first tokens, whose queries are no sample of the others; they stay.
        covariance: use Sigma too.
        norm: multiply by ``||v||``.
    """

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    norm: bool = True
    name: ClassVar[str] = "expected"
    private: ClassVar[bool] = True

    @property
    def attends(self) -> bool:
        """Unless values are in the score already."""
        return not self.norm

    def queries(self, tokens: int) -> int:
        """All but the sinks'."""
        return tokens

    def unmet(self, rotary: bool, outputs: int, layers: int) -> str | None:
        """The rotary embedding."""
        return None if rotary else "a rotary embedding of the usual kind"

    def score(self, view: LayerView, keep: int) -> Tensor:
        """Softmax of the expected logits over the tokens, the group's mean."""
        if view.rotary is None or view.positions is None:
            raise ValueError(
                "expected: needs the model's rotary embedding and the tokens' positions"
            )
        skip = min(self.sinks, view.tokens - 1)
        q = wide(view.last_queries(view.tokens, self.name, fewer=True))
        q = q[:, :, max(0, skip - view.tokens + q.shape[2]) :]
        mean, cov = self._future(view.rotary.undo(q, view.positions[-q.shape[2] :]), view)
        k, d = wide(view.k)[:, :, skip:], view.k.shape[-1]
        logits = torch.einsum("bhgd,bhtd->bhgt", grouped(mean, view.kv_heads), k) * d**-0.5
        if self.covariance:
            spread = torch.einsum("bhgde,bhte->bhgtd", grouped(cov, view.kv_heads), k)
            logits = logits + torch.einsum("bhgtd,bhtd->bhgt", spread, k) / (2 * d)
        score = logits.softmax(-1).mean(2)
        if self.norm:
            score = score * wide(view.v)[:, :, skip:].norm(dim=-1)
        return F.pad(score, (skip, 0), value=KEEP)

    def _future(self, q: Tensor, view: LayerView) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the queries, rotated by the mean rotation of the next positions."""
        assert view.rotary is not None
        assert view.positions is not None
        mean = q.mean(2)
        centred = q - mean[:, :, None]
        cov = torch.einsum("bhnd,bhne->bhde", centred, centred) / q.shape[2]
        turn = mean_rotation(view.rotary, int(view.positions[-1]) + 1, self.future, q)
        return mean @ turn.T, turn @ cov @ turn.T


def mean_rotation(rotary: Rotary, start: int, count: int, like: Tensor) -> Tensor:
    """Average the rotations of `count` positions. Shape: -> `[head_dim, head_dim]`."""
    positions = torch.arange(start, start + count, device=like.device)
    unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    turned = rotary.rotate(unit[:, None].expand(-1, count, -1), positions)  # row i: R e_i
    return turned.mean(1).T
