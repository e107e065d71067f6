"""Dispatch in shapes that do not depend on the routing: every expert gets its capacity of rows, empty ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...collectives import autograd
from ..agreement import agree
from ..edits import AddHook, Edit
from ..ranks import ModelRanks
from .capacity import Capacity
from .dispatch import Experts
from .place import Place
from .route import numbers


def to_slots(
    place: Place,
    experts: Experts,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    capacity: Capacity,
    most: int,
) -> Tensor:
    """Send to every slot as many rows as its expert may take, with zeros where it has fewer; the host reads nothing.

    What is dropped is decided on this rank's own tokens, unlike without padding.

    Args:
        most: tokens of the rank that has most; the same on all ranks.
    Shape: hidden [tokens, hidden], index (experts), weights [tokens, top_k] -> [tokens, hidden]
    Collective: owners; an all-to-all of equal runs there and back, each way also backward. Sent by each rank, in rows:
        2 * slots * capacity * (etp - 1/ep).
    Source: MoE Parallel Folding (arXiv 2504.14960) section 3.3, pad to capacity.
    """
    tokens, top_k = index.shape
    homes, etp = place.homes, place.etp
    rows = capacity.rows(most, top_k, place.experts)
    kept = capacity.kept(index, weights, place.experts, rows)
    slots = homes.spread(kept, place.turn).reshape(-1)
    width, empty = hidden.shape[1], homes.slots * rows
    at = slots * rows + torch.where(slots < homes.slots, numbers(slots, homes.slots + 1), 0)
    pairs = torch.full((empty + 1,), tokens * top_k, device=index.device)
    pairs[at] = torch.arange(tokens * top_k, device=index.device)
    padded = torch.cat([hidden, hidden.new_zeros(1, width)])
    out = padded.index_select(0, pairs[:empty] // top_k)
    ranks = place.along_ep.size
    out = out.view(ranks, 1, -1, width).expand(ranks, etp, -1, width).reshape(-1, width)
    out = autograd.all_to_all(out, place.owners.all)
    out = _swapped(out, place.owners.size, place.held, rows)
    out = experts(out, [place.owners.size * rows] * place.held)
    out = _swapped(out, place.held, place.owners.size, rows)
    out = autograd.all_to_all(out, place.owners.all).view(ranks, etp, -1, width).sum(1)
    back = torch.cat([out.reshape(-1, width), out.new_zeros(1, width)]).index_select(0, at)
    weighted = back.view(tokens, top_k, width) * weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden.dtype)


def _swapped(x: Tensor, outer: int, inner: int, rows: int) -> Tensor:
    """Bring runs of rows from the order (outer, inner) to (inner, outer); its own inverse with the two exchanged."""
    return x.view(outer, inner, rows, -1).transpose(0, 1).reshape(x.shape)


def batch_edits(model: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Compare the shapes of the dp ranks' inputs before every forward, where their tokens meet in equal runs."""
    group = ranks.groups.group("dp")
    if not ranks.plan.ep.pad or group is None:
        return []

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if given and given[0].device.type != "meta":
            agree(group, {"input's shape, with padded experts": str(tuple(given[0].shape))})

    return [AddHook(lambda: model.register_forward_pre_hook(compare, with_kwargs=True))]
