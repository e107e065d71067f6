"""Decode attention to the tokens that a selector chose, where they lie."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import paged_attention
from ..attention import LayerPages, ScoreOptions, attend_pages
from ..table import PageTable
from .selector import KeyView, Selection, Selector


def attend_selected(
    selector: Selector,
    memories: Listing[dict[int, dict[str, Any]]],
    layer: LayerPages, number: int, layers: int,
    table: PageTable, q: Tensor, lo: Tensor, hi: Tensor, options: ScoreOptions,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Ask the selector for each sequence's one row, and attend to what it chose; None if that is all of all.

    A row that may not see the whole sequence (a sliding window) is not asked about and reads what it may.

    Shape: q `[seqs, heads, head_dim]` -> o `[seqs, heads, value_dim]`, lse `[seqs, heads]`
    """
    shards = 1 if options.interleave is None else options.interleave.shards
    whole = (lo.cpu().numpy() <= 0) & (hi.cpu().numpy() >= table.lengths)
    plans: list[Selection | None] = [None] * len(memories)
    for at in np.flatnonzero(whole & (table.lengths > 0)).tolist():
        view = KeyView(
            layer.keys, torch.from_numpy(table.pages(at)), int(table.lengths[at]), number, layers,
            options.scale, shards, memories[at],
        )  # fmt: skip
        plans[at] = selector.plan(q[at], view)
    few = [at for at, plan in enumerate(plans) if plan is not None]
    if not few:
        return None
    if options.alibi_slopes is not None:
        raise ValueError("ALiBi counts distances, which a selection has lost; use no selector")
    chosen = [plan for plan in plans if plan is not None]
    if len(few) == len(memories):
        return attend_rows(layer, table, chosen, q, options)
    o = q.new_empty(*q.shape[:2], layer.value_dim)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    rest = [at for at, plan in enumerate(plans) if plan is None]
    few_table, rest_table = (
        PageTable([table.pages(at) for at in rows], table.lengths[rows], table.page_tokens)
        for rows in (few, rest)
    )
    o[few], lse[few] = attend_rows(layer, few_table, chosen, q[few], options)
    o[rest], lse[rest] = attend_pages(
        layer, rest_table, q[rest], np.arange(len(rest) + 1), lo[rest], hi[rest], options
    )
    return o, lse


def show_prompts(
    selector: Selector,
    memories: Listing[dict[int, dict[str, Any]]],
    layer: LayerPages, number: int, layers: int,
    table: PageTable, q: Tensor, indptr: np.ndarray, options: ScoreOptions,
) -> None:  # fmt: skip
    """Let the selector see the last queries of each sequence that has more than one.

    Shape: q `[rows, heads, head_dim]`, indptr `[seqs + 1]`
    """
    shards = 1 if options.interleave is None else options.interleave.shards
    for at, memory in enumerate(memories):
        first, stop = int(indptr[at]), int(indptr[at + 1])
        tokens = int(table.lengths[at])
        count = min(selector.queries(tokens), stop - first)
        if stop - first > 1 and count > 0 and tokens > 0:
            view = KeyView(
                layer.keys, torch.from_numpy(table.pages(at)), tokens, number, layers,
                options.scale, shards, memory,
            )  # fmt: skip
            selector.prompt(q[stop - count : stop], view)


def tokens_of(plan: Selection, length: int) -> list[np.ndarray]:
    """The tokens that each KV head reads, ascending."""
    units = plan.indices.cpu().numpy().astype(np.int64)
    lists = np.split(units, plan.indptr[1:-1].cpu().numpy())
    if plan.unit > 1:
        inside = np.arange(plan.unit)
        lists = [(own[:, None] * plan.unit + inside).ravel() for own in lists]
    return [tokens[tokens < length] for tokens in lists]


def attend_rows(
    layer: LayerPages,
    table: PageTable, plans: Listing[Selection], q: Tensor, options: ScoreOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with one row a sequence to chosen tokens; a KV head's row of a token is a page of one token.

    Shape: q `[seqs, heads, head_dim]`
    """
    size, heads = layer.keys.shape[1], layer.keys.shape[2]
    rows = []
    for at, plan in enumerate(plans):
        pages = table.pages(at).astype(np.int64)
        for head, tokens in enumerate(tokens_of(plan, int(table.lengths[at]))):
            rows.append((pages[tokens // size] * size + tokens % size) * heads + head)
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
