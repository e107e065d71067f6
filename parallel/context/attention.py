"""Attention under context parallelism: Ulysses inside, the ring outside, for any mask that transformers asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...collectives.primitive import Group
from ..errors import PlanError
from .order import SequenceOrder
from .ring import RingCall, ring_attention
from .ulysses import key_heads, to_heads, to_tokens
from .visible import Sees, Visible

CONTEXT = "plait_context"


@dataclass(frozen=True)
class Spread:
    """One sequence spread over the ranks, as rank ``rank`` of cp sees it.

    ``whole_positions`` and ``padding`` are what the caller gave for the whole batch: position ids in which documents
    begin anew, and the mask of real tokens; ``[batch, seq]`` or None.
    """

    order: SequenceOrder
    rank: int
    ring: Group
    ulysses: Group
    device: torch.device
    whole_positions: Tensor | None = None
    padding: Tensor | None = None

    @property
    def place(self) -> int:
        """This rank's place in the ring."""
        return self.rank // self.order.ulysses

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each rank of the Ulysses group."""
        first = self.place * self.order.ulysses
        return self.order.counts[first : first + self.order.ulysses]

    @cached_property
    def sorting(self) -> Tensor:
        """Order that sorts the tokens of the Ulysses group, rank after rank, by their place in the sequence."""
        first = self.place * self.order.ulysses
        held = [self.order.index(first + u) for u in range(self.order.ulysses)]
        return torch.argsort(torch.cat(held)).to(self.device)

    def visible(self, sees: Sees) -> Visible:
        """Ask a mask about the tokens that the ranks hold."""
        keys = [self.order.place_index(p).to(self.device) for p in range(self.order.ring)]
        return Visible(keys[self.place], keys, sees)


@dataclass(frozen=True)
class SpreadMask:
    """What stands for a mask between transformers' mask function and its attention function."""

    spread: Spread
    visible: Visible

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what only a tensor can do; for a name that no tensor has there is no attribute, as everywhere."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        raise computes_with_masks()

    def __getitem__(self, index: object) -> NoReturn:
        raise computes_with_masks()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sink: Tensor | None
    ) -> Tensor:
        """Attend with this rank's tokens to all tokens.

        Shape: q [batch, heads, seq/cp, d], k, v [batch, kv_heads, seq/cp, d] -> [batch, heads, seq/cp, d]
        Collective: all ranks of cp; see ``to_heads`` and ``ring_attention``.
        """
        spread = self.spread
        own = spread.order.counts[spread.rank]
        q, k, v = (t[:, :, :own] for t in (q, k, v))
        if spread.ulysses is not None:
            q, k, v, sink = self._exchange(q, k, v, sink)
        o = ring_attention(q, k, v, RingCall(self.visible, spread.ring, scale, softcap), sink)
        if spread.ulysses is not None:
            o = to_tokens(o[:, :, torch.argsort(spread.sorting)], spread.ulysses, spread.counts)
        return o if own else F.pad(o, (0, 0, 0, 1))

    def _exchange(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Bring this rank's run of heads together; KV heads that several ranks read are copied."""
        spread, group = self.spread, self.spread.ulysses
        assert group is not None
        ranks, heads, kv_heads = group.size(), q.shape[1], k.shape[1]
        sent = key_heads(heads, kv_heads, ranks)
        # heads of one KV group on several ranks that share others: a copy for each head
        if sent is None:
            sent = [head * kv_heads // heads for head in range(heads)]
        if sent != list(range(kv_heads)):
            k, v = k[:, sent], v[:, sent]
        if sink is not None:
            share = heads // ranks
            sink = sink[group.rank() * share : (group.rank() + 1) * share]
        whole = (to_heads(t, group, spread.counts)[:, :, spread.sorting] for t in (q, k, v))
        return (*whole, sink)  # type: ignore[return-value]


def computes_with_masks() -> PlanError:
    """Make the error of a model that does more with a mask than to hand it to attention."""
    return PlanError(
        "cp of this model",
        "needs attention that only reads its mask, but this one computes with it, and here no rank has the whole",
        "use cp=1 for this model",
    )


def context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over cp; registered with transformers as the attention implementation ``plait_context``."""
    if dropout:
        raise PlanError(
            f"attention dropout {dropout}",
            "cannot be exact when a row's keys are on several ranks",
            "set attention_dropout=0, or use cp=1",
        )
    if position_bias is not None or not isinstance(attention_mask, SpreadMask):
        raise PlanError(
            f"attention of {type(module).__name__}",
            "brings a mask or bias of its own, which is not cut over cp",
            "give 2-D padding masks or position_ids with documents, or use cp=1",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    o = attention_mask.attend(query, key, value, scale, softcap or 0.0, s_aux)
    return o.transpose(1, 2).contiguous(), None


__all__ = ["CONTEXT", "Spread", "SpreadMask", "context_attention"]
