"""Merge partial attention outputs by their log-sum-exp (natural log).

Partials over disjoint sets of keys (shards, ranks, splits of one shard) combine exactly:
`m = max lse`, `w = exp(lse - m)`, `o = sum(w * o) / sum(w)`, `lse = m + log(sum(w))`.

Source: FlashDecoding; Helix Parallelism (arXiv 2507.07120) section 2.2.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

NEG_INF = float("-inf")
MOST_ELEMENTS = 1 << 20  # beyond that torch's threads are worth their dozen passes


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


def direct(x: Tensor) -> bool:
    """Say whether a CPU kernel may be called past torch's dispatcher, which costs 50 us per operator.

    Only with a plain CPU tensor and nothing being compiled: tracers need the operator.
    """
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


@njit(nogil=True, cache=True)  # no fast math: -inf and NaN mean something here
def _merge(o, lse, sink, out, out_lse):
    """One pass over the partials; see `merge_states_reference` for what an empty shard means."""
    shards, rows, heads, width = o.shape
    for r in range(rows):
        for h in range(heads):
            top = sink[h] if sink.size else lse.dtype.type(-np.inf)
            for s in range(shards):
                if lse[s, r, h] > top or lse[s, r, h] != lse[s, r, h]:
                    top = lse[s, r, h]
            out_lse[r, h] = top
            for x in range(width):
                out[r, h, x] = 0
            if top == -np.inf:
                continue
            total = np.exp(sink[h] - top) if sink.size else top * 0
            for s in range(shards):
                if lse[s, r, h] != -np.inf:
                    weight = np.exp(lse[s, r, h] - top)
                    total += weight
                    for x in range(width):
                        out[r, h, x] += weight * o[s, r, h, x]
            for x in range(width):
                out[r, h, x] /= total
            out_lse[r, h] = top + np.log(total)


def merge_plain(
    o: Tensor, lse: Tensor, sink: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge without autograd: one pass in Numba for a few rows on the CPU, else torch."""
    if o.shape[0] == 1 and sink is None and empty is None:
        gone = (lse[0] == NEG_INF).unsqueeze(-1)
        return o[0].masked_fill(gone, 0.0), lse[0].clone()
    same = o.dtype == lse.dtype and o.dtype in (torch.float32, torch.float64)
    if not same or empty is not None or o.device.type != "cpu" or o.numel() > MOST_ELEMENTS:
        return merge_states_reference(o, lse, sink, empty)
    logits = lse.new_empty(0) if sink is None else sink.detach().to(lse.dtype)
    merged, merged_lse = o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])
    _merge(*(t.detach().numpy() for t in (o, lse, logits, merged, merged_lse)))
    return merged, merged_lse


@torch.library.custom_op("plait::merge_states", mutates_args=())
def merge_states_op(
    o: Tensor, lse: Tensor, sink: Tensor | None, empty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge behind torch's dispatcher, for tracers and compilers."""
    return merge_plain(o, lse, sink, empty)


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
    return (merge_plain if direct(o) else merge_states_op)(o, lse, sink, empty)


__all__ = ["direct", "merge_plain", "merge_states", "merge_states_reference"]
