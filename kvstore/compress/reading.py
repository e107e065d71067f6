"""Attention to what lanes kept: rows of each sequence, bounds in places of the text."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import dense_attention
from ..attention import LayerPages, ScoreOptions, attend_pages
from ..table import PageTable
from .lanes import LanePool, Lanes
from .shard import Shard


@dataclass(frozen=True)
class LaneRows:
    """Rows of some sequences, lane after lane: each KV head of each sequence is asked by its group of query heads.

    Shape: q `[lane rows, group, head_dim]`; indptr `[lanes + 1]`; lo, hi `[lane rows]` of the lane's own tokens.
    """

    q: Tensor
    indptr: np.ndarray
    lo: Tensor
    hi: Tensor
    table: PageTable


def lane_rows(
    pool: LanePool, lanes: Listing[Lanes], lengths: np.ndarray,
    q: Tensor, rows: np.ndarray, lo: np.ndarray, hi: np.ndarray,
) -> LaneRows:  # fmt: skip
    """Turn rows and their bounds in the text into rows of lanes and bounds in what lanes kept.

    Shape: q `[sum(rows), heads, head_dim]`; lengths, rows `[seqs]`; lo, hi `[sum(rows)]`
    """
    heads = len(lanes[0].counts)
    starts = np.concatenate([[0], np.cumsum(rows)])
    table = pool.table(list(lanes))
    per_lane = np.repeat(rows, heads)
    indptr = np.concatenate([[0], np.cumsum(per_lane)])
    order = np.concatenate(
        [np.tile(np.arange(a, a + n), heads) for a, n in zip(starts, rows, strict=False)]
    )
    head = np.concatenate([np.repeat(np.arange(heads), n) for n in rows])
    grouped = q.unflatten(1, (heads, -1))
    lane = np.repeat(np.arange(len(per_lane)), per_lane)
    first, stop = np.zeros(len(order), np.int64), table.lengths[lane]
    cut = np.flatnonzero((lo[order] > 0) | (hi[order] < lengths[lane // heads]))
    for n in np.unique(lane[cut]):
        mine = slice(int(indptr[n]), int(indptr[n + 1]))
        pages = table.pages(int(n))
        places = pool.places[pages].ravel()[: table.lengths[n]]
        first[mine] = np.searchsorted(places, lo[order[mine]])
        stop[mine] = np.searchsorted(places, hi[order[mine]])
    picked = grouped[torch.from_numpy(order), torch.from_numpy(head)]
    return LaneRows(picked, indptr, torch.from_numpy(first), torch.from_numpy(stop), table)


def by_sequence(x: Tensor, rows: np.ndarray, heads: int) -> Tensor:
    """Undo the order of `lane_rows`. Shape: `[lane rows, group, ...]` -> `[rows, heads * group, ...]`"""
    pieces = x.split((rows * heads).tolist())
    whole = [
        piece.unflatten(0, (heads, int(n))).transpose(0, 1).flatten(1, 2)
        for piece, n in zip(pieces, rows, strict=True)
        if n
    ]
    return torch.cat(whole) if whole else x.reshape(0, heads * x.shape[1], *x.shape[2:])


def attend_lanes(
    pool: LanePool, asked: LaneRows, options: ScoreOptions
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to exact pages. Shape: -> `[lane rows, group, value_dim]`, `[lane rows, group]`"""
    return attend_pages(
        regions(pool), asked.table, asked.q, asked.indptr, asked.lo, asked.hi, options
    )  # fmt: skip


def regions(pool: LanePool) -> LayerPages:
    """The memory of all lanes."""
    return LayerPages(pool.pool.keys[0], pool.pool.values[0], pool.pool.spec.v_dim)


def attend_whole(
    k: Tensor, v: Tensor, q: Tensor, lo: np.ndarray, hi: np.ndarray, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Attend to a first prompt that is in no page yet. Shape: k `[tokens, kv_heads, head_dim]`"""
    low, high = (torch.from_numpy(x).to(q.device) for x in (lo, hi))
    return dense_attention(q, k, v, low, high, options.scale, options.softcap)


def hear(
    pool: LanePool, asked: LaneRows, lse: Tensor, scale: float, shard: Shard, most: bool = False
) -> None:
    """Add to each token the attention it received from these rows, the group's mean; or keep the most of any.

    Collective: over kvp, one all-gather of lse: attention is a share of the whole text's.
    """
    if pool.received is None:
        return
    if shard.kvp is not None:
        lse = shard.total(lse)
    keys, heard = pool.pool.keys[0].flatten(0, 2), pool.received.view(-1)
    for lane in range(len(asked.indptr) - 1):
        rows = slice(int(asked.indptr[lane]), int(asked.indptr[lane + 1]))
        tokens = int(asked.table.lengths[lane])
        if rows.stop == rows.start or not tokens:
            continue
        index = np.arange(tokens)
        page = asked.table.pages(lane)[index // pool.size].astype(np.int64)
        slots = torch.from_numpy(page * pool.size + index % pool.size)
        q = asked.q[rows].to(lse.dtype)
        logits = torch.einsum("ngd,td->ngt", q, keys[slots].to(lse.dtype)) * scale
        weight = (logits - lse[rows][..., None]).exp()
        weight = weight.amax(1) if most else weight.mean(1)  # [rows, tokens]
        token = torch.from_numpy(index)
        seen = (token >= asked.lo[rows, None]) & (token < asked.hi[rows, None])
        weight = weight.masked_fill(~seen, 0).to(heard.dtype)
        heard[slots] = (
            weight.amax(0).maximum(heard[slots]) if most else heard[slots] + weight.sum(0)
        )
