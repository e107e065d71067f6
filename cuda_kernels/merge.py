"""Merge partial attention outputs by their log-sum-exp (natural log).

Partials over disjoint sets of keys (shards, ranks, splits of one shard) combine exactly:
`m = max lse`, `w = exp(lse - m)`, `o = sum(w * o) / sum(w)`, `lse = m + log(sum(w))`.

Source: FlashDecoding; Helix Parallelism (arXiv 2507.07120) section 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def merge_states_reference(
    o: Tensor, lse: Tensor, sink: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partials in plain torch, differentiable in `o`, `lse` and `sink`.

    An empty shard (`lse == -inf`, or flagged in `empty`) has weight zero whatever its `o` and
    `lse` hold, NaN included. A NaN `lse` that is not flagged stays NaN: it is an error to see.

    Shape:
        o `[shards, rows, heads, value_dim]`, lse `[shards, rows, heads]`, sink `[heads]`,
        empty `[shards, rows]` or `[shards, rows, heads]` (bool)
        -> o `[rows, heads, value_dim]`, lse `[rows, heads]`
    """
    if empty is not None:
        if empty.dim() == lse.dim() - 1:
            empty = empty.unsqueeze(-1)
        lse = lse.masked_fill(empty, NEG_INF)
    o = torch.where((lse == NEG_INF).unsqueeze(-1), torch.zeros_like(o), o)
    with torch.no_grad():  # the shift cancels: it has no gradient
        top = lse.amax(0)
        if sink is not None:
            top = torch.maximum(top, sink.to(lse.dtype))
        top = torch.where(top == NEG_INF, torch.zeros_like(top), top)
    weight = torch.exp(lse - top)
    total = weight.sum(0)
    if sink is not None:
        total = total + torch.exp(sink.to(lse.dtype) - top)
    none = total == 0
    total = torch.where(none, torch.ones_like(total), total)
    merged = (weight.unsqueeze(-1) * o.to(lse.dtype)).sum(0) / total.unsqueeze(-1)
    merged_lse = torch.where(none, torch.full_like(top, NEG_INF), top + torch.log(total))
    return merged.to(o.dtype), merged_lse


@torch.library.custom_op("plait::merge_states", mutates_args=())
def merge_states_op(
    o: Tensor, lse: Tensor, sink: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the merge without autograd; the torch reference serves every device."""
    if o.shape[0] == 1 and sink is None and empty is None:
        gone = (lse[0] == NEG_INF).unsqueeze(-1)
        return o[0].masked_fill(gone, 0.0), lse[0].clone()
    return merge_states_reference(o, lse, sink, empty)


@merge_states_op.register_fake
def _(o: Tensor, lse: Tensor, sink: Tensor | None, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])


def merge_states(
    o: Tensor, lse: Tensor, sink: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partial attention outputs over disjoint keys into one.

    Rows that are empty in every shard give `o = 0` and `lse = -inf`. `sink` is a logit per head
    that joins the denominator exactly once, here; the returned lse then includes it, so never
    give a sink both to the partials and to the merge. Differentiable when an input requires grad.

    Shape:
        o `[shards, rows, heads, value_dim]`, lse `[shards, rows, heads]` (natural log),
        sink `[heads]`, empty `[shards, rows]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]`

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if o.dim() != 4 or lse.shape != o.shape[:-1]:
        raise ValueError(
            f"merge_states: o {list(o.shape)} and lse {list(lse.shape)} do not fit; "
            "use o [shards, rows, heads, value_dim] with lse [shards, rows, heads]"
        )
    if sink is not None and sink.shape != o.shape[2:3]:
        raise ValueError(f"merge_states: sink {list(sink.shape)} must be [heads={o.shape[2]}]")
    inputs = (o, lse) if sink is None else (o, lse, sink)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return merge_states_reference(o, lse, sink, empty)
    return merge_states_op(o, lse, sink, empty)


__all__ = ["merge_states", "merge_states_reference"]
