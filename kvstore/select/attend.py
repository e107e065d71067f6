"""Decode attention to the tokens that a selector chose, where they lie."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import paged_attention
from ..attention import LayerPages, ScoreOptions
from ..sequence import Sequence
from ..table import PageTable
from .selector import KeyView, Selection, Selector


def attend_selected(
    selector: Selector,
    seqs: Listing[Sequence],
    layer: LayerPages, number: int, layers: int,
    table: PageTable, q: Tensor, lo: Tensor, hi: Tensor, options: ScoreOptions,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Ask the selector for each sequence's one row, and attend to what it chose; None if it wants all of all.

    A row reads of its choice what lies in `[lo, hi)`.

    Shape: q `[seqs, heads, head_dim]` -> o `[seqs, heads, value_dim]`, lse `[seqs, heads]`
    """
    plans = []
    shards = 1 if options.interleave is None else options.interleave.shards
    for at, seq in enumerate(seqs):
        pages = torch.from_numpy(table.pages(at))
        view = KeyView(
            layer.keys, pages, int(table.lengths[at]), number, layers, options.scale, shards,
            seq.memory.setdefault(number, {}),
        )  # fmt: skip
        plans.append(selector.plan(q[at : at + 1], view) if view.tokens else None)
    if all(plan is None for plan in plans):
        return None
    if options.alibi_slopes is not None:
        raise ValueError("ALiBi counts distances, which a selection has lost; use no selector")
    heads = layer.keys.shape[2]
    bounds = np.stack([lo.cpu().numpy(), hi.cpu().numpy()], 1)
    chosen = [
        tokens[(tokens >= low) & (tokens < high)]
        for plan, length, (low, high) in zip(plans, table.lengths, bounds, strict=True)
        for tokens in tokens_of(plan, int(length), heads)
    ]
    return attend_rows(layer, table, chosen, q, options)


def tokens_of(plan: Selection | None, length: int, kv_heads: int) -> list[np.ndarray]:
    """The tokens that each KV head reads, ascending; all if there is no plan."""
    if plan is None:
        return [np.arange(length)] * kv_heads
    units = plan.indices.cpu().numpy().astype(np.int64)
    if plan.unit > 1:
        tokens = units[:, None] * plan.unit + np.arange(plan.unit)
        edges = plan.indptr.cpu().numpy()
        lists = [tokens[a:b].ravel() for a, b in pairwise(edges)]
    else:
        lists = np.split(units, plan.indptr.cpu().numpy()[1:-1])
    return [tokens[tokens < length] for tokens in lists]


def attend_rows(
    layer: LayerPages, table: PageTable, chosen: list[np.ndarray], q: Tensor, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Attend with one row a sequence to chosen tokens; a KV head's row of a token is a page of one token.

    Shape: chosen `[seqs * kv_heads]` lists of tokens; q `[seqs, heads, head_dim]`
    """
    size, heads = layer.keys.shape[1], layer.keys.shape[2]
    rows = []
    for lane, tokens in enumerate(chosen):
        pages = table.pages(lane // heads).astype(np.int64)
        rows.append((pages[tokens // size] * size + tokens % size) * heads + lane % heads)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    indptr = torch.zeros(len(rows) + 1, dtype=torch.int64)
    indptr[1:] = counts.cumsum(0)
    indices = torch.from_numpy(np.concatenate(rows)).int()
    lanes = q.reshape(len(rows), -1, q.shape[-1])  # [seqs * kv_heads, group, head_dim]
    o, lse = paged_attention(
        lanes, layer.keys.view(-1, 1, 1, layer.keys.shape[-1]),
        layer.values.view(-1, 1, 1, layer.values.shape[-1]),
        torch.arange(len(rows) + 1), indptr.int(), indices,
        torch.zeros_like(counts), counts, options.scale, options.softcap, None, None, None,
        layer.value_dim,
    )  # fmt: skip
    return o.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2])
