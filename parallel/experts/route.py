"""Which rows go to which expert: orders of rows, each beside its inverse. Arithmetic on indices only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cuda_kernels import sort_by_expert


@dataclass(frozen=True)
class Assignment:
    """The (token, choice) pairs of some tokens, sorted by expert.

    Attributes:
        order: [pairs]; pair number ``token * top_k + choice`` of each sorted row.
        counts: [experts]; rows of each expert.
        top_k: choices of each token.
    """

    order: Tensor
    counts: Tensor
    top_k: int

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Assignment:
        """Sort the pairs of ``index`` [tokens, top_k] by expert, pairs of one expert by token.

        Pairs of expert number ``experts`` are dropped ones: they are last in order and not counted.
        """
        flat = index.reshape(-1)
        if index.device.type == "meta":
            return cls(flat, even(flat.numel(), experts), index.shape[1])
        return cls(*sort_by_expert(index, experts), index.shape[1])

    def kept(self, first: int, last: int, counts: list[int]) -> Tensor:
        """The part of the order that belongs to the experts ``[first, last)``."""
        start = sum(counts[:first])
        return self.order[start : start + sum(counts[first:last])]


def count(experts_of_rows: Tensor, experts: int) -> Tensor:
    """Count rows by expert; on meta, where nothing is known, an even share for all."""
    if experts_of_rows.device.type == "meta":
        return even(experts_of_rows.numel(), experts)
    return torch.bincount(experts_of_rows, minlength=experts)[:experts]


def numbers(experts_of_rows: Tensor, experts: int, order: Tensor | None = None) -> Tensor:
    """Number each row among those of its expert, from 0, as they stand or as they stand in ``order``.

    Shape: [rows] -> [rows]. The host reads nothing.
    """
    flat = experts_of_rows
    by = (
        torch.argsort(flat, stable=True)
        if order is None
        else order[torch.argsort(flat[order], stable=True)]
    )
    counts = torch.zeros(experts, dtype=torch.long, device=flat.device)
    counts = counts.index_add(0, flat, torch.ones_like(flat))
    starts = counts.cumsum(0) - counts
    number = torch.empty_like(flat)
    number[by] = torch.arange(flat.numel(), device=flat.device) - starts[flat[by]]
    return number


def even(rows: int, experts: int) -> Tensor:
    """Share rows out evenly: what a run without values assumes of the router."""
    return torch.tensor(
        [(rows * (e + 1)) // experts - (rows * e) // experts for e in range(experts)]
    )


def by_expert(received: Tensor) -> Tensor:
    """The order that brings rows from (source, expert) to (expert, source).

    Shape: received [sources, experts], rows that each source sent for each expert -> [rows]
    """
    sources, experts = received.shape
    expert = torch.arange(experts, device=received.device).repeat(sources)
    return torch.argsort(expert.repeat_interleave(received.reshape(-1)), stable=True)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes an order."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return back
