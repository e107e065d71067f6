"""Ring attention: queries stay, keys and values travel around the ring, partial outputs are merged by lse.

Source: Ring Attention (arXiv 2310.01889). Memory is linear in seq/cp: a rank holds its own part and two more, and
scores exist a tile at a time. The backward lets keys and values travel again, and the sums of their gradients with
them, one pass behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...collectives.primitive import Group
from ...collectives.ring_exchange import Homecoming, travel
from ...cuda_kernels.partial_attention import (
    merge_into,
    partial_attention,
    partial_attention_backward,
)
from .visible import Visible


@dataclass(frozen=True)
class RingCall:
    """What one call of ring attention needs beside its tensors."""

    visible: Visible
    group: Group
    scale: float
    softcap: float = 0.0


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, call: RingCall, sink: Tensor | None = None
) -> Tensor:
    """Attend with own rows to the keys of all ranks.

    Shape: q ``[batch, heads, rows, d]``, k ``[batch, kv_heads, keys, d]``, v ``[batch, kv_heads, keys, value_dim]``,
        sink ``[heads]``, a logit per head in the denominator -> ``[batch, heads, rows, value_dim]``
    Collective: all ranks of the ring; forward each part of keys and values makes ring - 1 passes; backward it makes
        them again, and the sums of its gradients make one more.
    """
    return _RingAttention.apply(q, k, v, sink, call)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: RingCall
    ) -> Tensor:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=work)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=work)
        for source, part in travel(_pack(k, v), call.group, _sizes(k, v, call)):
            if q.device.type != "meta":
                _attend(q, *_unpack(part, k, v), o, lse, call, source)
        if sink is not None:  # one more key, which carries no value
            with_sink = torch.logaddexp(lse, sink.to(work)[:, None])
            o.mul_(torch.exp(lse - with_sink).unsqueeze(-1))
            lse = with_sink
        o = o.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, sink, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, o, lse = ctx.saved_tensors
        call: RingCall = ctx.call
        sizes = _sizes(k, v, call)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        sums = Homecoming(call.group, sizes)
        for source, part in travel(_pack(k, v), call.group, sizes):
            mine = part.new_zeros(part.numel(), dtype=lse.dtype)
            if q.device.type != "meta":
                into = (dq, *_unpack(mine, k, v))
                _attend_backward(grad, q, *_unpack(part, k, v), o, finite, into, call, source)
            sums.add(mine)
        dk, dv = _unpack(sums.home(), k, v)
        dsink = None
        if sink is not None:
            delta = (grad.to(lse.dtype) * o).sum(-1)
            share = -torch.exp(sink.to(lse.dtype)[:, None] - lse) * delta
            dsink = share.sum((0, 2)).to(sink.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: RingCall, source: int
) -> None:
    """Merge attention to one rank's keys into ``o`` and ``lse``."""
    for rows, keys, mask in call.visible.tiles(source):
        part, part_lse = partial_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], call.scale, mask, call.softcap
        )
        merge_into(o[:, :, rows], lse[:, :, rows], part, part_lse)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    into: tuple[Tensor, Tensor, Tensor], call: RingCall, source: int,
) -> None:  # fmt: skip
    """Add the gradients through one rank's keys to ``into``: of own queries, and of its keys and values."""
    dq, dk, dv = into
    for rows, keys, mask in call.visible.tiles(source):
        found = partial_attention_backward(
            grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows],
            lse[:, :, rows], call.scale, mask, call.softcap,
        )  # fmt: skip
        dq[:, :, rows] += found[0]
        dk[:, :, keys] += found[1]
        dv[:, :, keys] += found[2]


def _sizes(k: Tensor, v: Tensor, call: RingCall) -> list[int]:
    """Elements of keys and values of each rank."""
    token = k.shape[0] * k.shape[1] * (k.shape[-1] + v.shape[-1])
    return [token * len(keys) for keys in call.visible.keys]


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Make one message of keys and values. Undone by `_unpack`."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpack(part: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """View a message as keys and values of the shapes of own ones, but for the number of tokens."""
    batch, heads = k.shape[:2]
    tokens = part.numel() // (batch * heads * (k.shape[-1] + v.shape[-1]))
    at = batch * heads * tokens * k.shape[-1]
    shape = (batch, heads, tokens)
    return part[:at].view(*shape, k.shape[-1]), part[at:].view(*shape, v.shape[-1])


__all__ = ["RingCall", "ring_attention"]
