"""What crosses the wire inside Helix attention: partial outputs, or keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...collectives import autograd, primitive
from ...collectives.peer_partials import PeerRun, partials
from ...collectives.primitive import Group
from ...cuda_kernels.merge import merge_states
from ..context.ring import RingCall, ring_attention
from .step import Step


def exchange_partials(o: Tensor, lse: Tensor, group: Group, sink: Tensor | None = None) -> Tensor:
    """Send each rank its run of heads of the local partial, and merge what the others send.

    lse travels in the same record as the output, so there is one message per pair of ranks.

    Shape: o [rows, heads/tp, d], lse [rows, heads/tp] -> [rows, heads/(kvp*tp), d]
    Collective: one all-to-all over kvp; each rank sends rows * heads/tp * (d + lse) * (kvp - 1) / kvp elements.
    Source: Helix Parallelism section 2.2.
    """
    if group is None:
        return o if sink is None else merge_states(o[None], lse[None], sink)[0].to(o.dtype)
    if not (torch.is_grad_enabled() and (o.requires_grad or lse.requires_grad)):
        chunks = Chunks(group, [len(o)])
        if chunks.to_slots(o, lse):
            chunks.send(o, lse)
            return chunks.merge(sink)
    return _merged(autograd.all_to_all(_by_rank(o, lse, group.size()), group), o, lse.dtype, sink)


@dataclass(frozen=True)
class Sent:
    """Partials on their way to the ranks that keep their heads."""

    started: primitive.Started
    like: Tensor
    lse_dtype: torch.dtype

    def merge(self, sink: Tensor | None = None) -> Tensor:
        """Wait for what the others send, and merge it; see ``exchange_partials``."""
        return _merged(self.started.wait(), self.like, self.lse_dtype, sink)


def send_partials(o: Tensor, lse: Tensor, group: dist.ProcessGroup) -> Sent:
    """Begin what ``exchange_partials`` does, and return while it is under way. No gradients."""
    record = _by_rank(o, lse, group.size())
    return Sent(primitive.start_all_to_all(record, group), o, lse.dtype)


class Chunks:
    """A step's partials on their way, chunk by chunk, of so many rows each. No gradients.

    On CUDA, where ranks have each other's memory mapped, they go straight to where they are merged, in one launch for
    all chunks (collectives/peer_partials.py); elsewhere each chunk is an all-to-all and a merge.

    Collective: over kvp; together the bytes of ``exchange_partials``.
    """

    def __init__(self, group: dist.ProcessGroup, rows: Sequence[int]) -> None:
        self.group, self.rows = group, rows
        self.run: PeerRun | None = None
        self.sent: list[Sent] = []

    def to_slots(self, o: Tensor, lse: Tensor) -> bool:
        """Say whether chunks like this one go straight to where they are merged; all ranks answer alike."""
        peers = partials.of(self.group, o)
        if self.run is None and peers is not None and peers.serves(self.rows, o, lse):
            self.run = peers.begin(self.rows, o)
        return self.run is not None

    def send(self, o: Tensor, lse: Tensor) -> None:
        """Begin to send a chunk."""
        if not self.sent and self.to_slots(o, lse):
            assert self.run is not None
            self.run.send(o, lse)
        else:
            self.sent.append(send_partials(o, lse, self.group))

    def merge(self, sink: Tensor | None = None) -> Tensor:
        """Wait for all chunks, and merge what came. Shape: -> [all rows, heads/(kvp*tp), d]"""
        if self.run is not None:
            return self.run.merge(sink)
        return torch.cat([chunk.merge(sink) for chunk in self.sent])


def _by_rank(o: Tensor, lse: Tensor, shards: int) -> Tensor:
    """Pack output and lse into one record a head, the heads of each rank together."""
    rows, heads, _ = o.shape
    if torch.is_grad_enabled() and (o.requires_grad or lse.requires_grad):
        record = torch.cat([o.to(lse.dtype), lse.unsqueeze(-1)], -1)
    else:
        # The bits of lse ride in the output's dtype, so a bf16 payload keeps a float32 lse.
        record = torch.cat([o, lse.unsqueeze(-1).view(o.dtype)], -1)
    by_rank = record.view(rows, shards, heads // shards, record.shape[-1]).transpose(0, 1)
    return by_rank.contiguous()


def _merged(received: Tensor, o: Tensor, lse_dtype: torch.dtype, sink: Tensor | None) -> Tensor:
    """Unpack the ranks' records and merge them by lse."""
    width = o.shape[-1]
    partial, weight = received[..., :width], received[..., width:]
    if received.dtype != lse_dtype:
        weight = weight.contiguous().view(lse_dtype)
    merged, _ = merge_states(partial, weight.squeeze(-1), sink)
    return merged.to(o.dtype)


def connected(o: Tensor, *inputs: Tensor | None) -> Tensor:
    """Keep an empty shard in the autograd graph: its backward collectives have partners on other ranks, who wait.

    Adds a zero that depends on every input; without autograd it returns ``o`` itself.
    """
    if not torch.is_grad_enabled():
        return o
    for x in inputs:
        if x is not None and x.requires_grad:
            o = o + x.sum().to(o.dtype) * 0
    return o


def gather_keys(
    k: Tensor, v: Tensor | None, group: Group, step: Step
) -> tuple[Tensor, Tensor | None]:
    """Gather every shard's keys and values and put them in order of (sequence, position).

    Shape: k, v [local keys, kv_heads, d] -> [all keys, kv_heads, d]
    Collective: one all-gather over kvp of k and v together, padded to the largest shard.
    """
    width = k.shape[-1]
    local = k if v is None else torch.cat([k, v], -1)
    every = autograd.gather(local, group, 0, step.keys_of_rank, partial=True).index_select(
        0, step.key_order
    )
    return (every, None) if v is None else (every[..., :width], every[..., width:])


def pass_keys(
    q: Tensor, k: Tensor, v: Tensor, group: Group, step: Step, scale: float, softcap: float | None,
    sink: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend with own rows to every shard's keys and values, which travel around the ring of kvp.

    No rank holds more than three shards at a time. Every rank's own keys are those it must keep for decoding.

    Shape: q [own rows, heads, d], k, v [local keys, kv_heads, d] -> [own rows, heads, d]
    Collective: all ranks of kvp; see ``ring_attention``.
    """
    call = RingCall(step.visible, group, scale, softcap or 0.0)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    o = ring_attention(q, k, v, call, sink)
    return o[0].transpose(0, 1)


def rows_to_heads(x: Tensor, group: Group, step: Step) -> Tensor:
    """Turn own rows of all the group's heads into all rows of this rank's run of heads (a pencil transpose).

    Shape: [rows/kvp, heads/tp * d] -> [rows, heads/(kvp*tp) * d]
    Collective: one all-to-all over kvp with uneven counts.
    """
    assert group is not None
    shards = group.size()
    rows, width = x.shape
    by_rank = (
        x.view(rows, shards, width // shards)
        .transpose(0, 1)
        .reshape(rows * shards, width // shards)
    )
    received = autograd.all_to_all(by_rank, group, [rows] * shards, step.rows_of_rank)
    return received.index_select(0, step.restore)


def partials_elements(rows: int, heads: int, width: int, shards: int) -> float:
    """Elements one rank sends to exchange partials."""
    return rows * heads * (width + 1) * (shards - 1) / shards


def kv_elements(rows: int, keys: int, heads: int, width: int, kv_width: int, shards: int) -> float:
    """Elements one rank sends to gather keys and values and return the rows."""
    return (keys * kv_width + rows * heads * width / shards) * (shards - 1) / shards


def cheaper(rows: int, keys: int, heads: int, width: int, kv_width: int, shards: int) -> str:
    """Choose the exchange that sends fewer bytes: partials for few rows on a long context, KV for a long prompt."""
    partials = partials_elements(rows, heads, width, shards)
    return (
        "kv" if kv_elements(rows, keys, heads, width, kv_width, shards) < partials else "partials"
    )
