"""Dot products of a few queries with what stands in a sequence's pages: its keys, or summaries of them.

With ranges, `sum_c max(q_c low_c, q_c high_c)` is two dot products, of q's positive part with high and of its negative
part with low: so one kernel serves exact logits, Quest's bound, and scores over some of the channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .decode_spans import dot, dots4, score_pair
from .kernel_cache import njit
from .merge import direct
from .numbers import flat, plain
from .row_products import LANES
from .workers import run_shares

MIN_SHARE_BYTES = 1 << 20  # of rows read per thread


def unit_scores_reference(
    q: Tensor, region: Tensor, pages: Tensor, count: int,
    q_other: Tensor | None = None, other: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Score in plain torch. Shape: as `unit_scores`."""
    rows = region[pages.long()].flatten(0, 1)[:count].to(q.dtype)
    scores = torch.einsum("hid,uhd->hiu", q, rows)
    if other is not None and q_other is not None:
        rows = other[pages.long()].flatten(0, 1)[:count].to(q.dtype)
        scores = scores + torch.einsum("hid,uhd->hiu", q_other, rows)
    return scores


@njit(nogil=True, error_model="numpy")
def _vector_scores(out, q, region, pages, page_units, width, first, stop, add):
    """Rows that are whole vectors, two units at once."""
    kv_heads, queries = q.shape[0], q.shape[1]
    at, each = np.int64(region.ctypes.data), width * region.itemsize
    s = np.empty((queries, 2), q.dtype)
    for u in range(first, stop, 2):
        two = min(u + 1, stop - 1)
        a = (pages[u // page_units] * page_units + u % page_units) * kv_heads
        b = (pages[two // page_units] * page_units + two % page_units) * kv_heads
        for h in range(kv_heads):
            score_pair(s, 0, q[h], 0, queries, at + (a + h) * each, at + (b + h) * each, region)
            for i in range(queries):
                for n in range(two - u + 1):
                    out[h, i, u + n] = s[i, n] + out[h, i, u + n] if add else s[i, n]


@njit(nogil=True, error_model="numpy")
def _scores(out, q, region, pages, page_units, width, first, stop, add):
    kv_heads, queries = q.shape[0], q.shape[1]
    if width % LANES == 0:
        _vector_scores(out, q, region, pages, page_units, width, first, stop, add)
        return
    fours = queries // 4 * 4
    for u in range(first, stop):
        slot = (pages[u // page_units] * page_units + u % page_units) * kv_heads
        for h in range(kv_heads):
            row = region[(slot + h) * width : (slot + h + 1) * width]
            for i in range(0, fours, 4):
                a, b, c, d = dots4(q[h, i], q[h, i + 1], q[h, i + 2], q[h, i + 3], row)
                if add:
                    a, b = a + out[h, i, u], b + out[h, i + 1, u]
                    c, d = c + out[h, i + 2, u], d + out[h, i + 3, u]
                out[h, i, u], out[h, i + 1, u] = a, b
                out[h, i + 2, u], out[h, i + 3, u] = c, d
            for i in range(fours, queries):
                a = dot(q[h, i], row)
                out[h, i, u] = a + out[h, i, u] if add else a


def _scores_cpu(
    q: Tensor,
    region: Tensor,
    pages: Tensor,
    count: int,
    q_other: Tensor | None,
    other: Tensor | None,
) -> Tensor:
    kv_heads, queries, width = q.shape
    out = torch.empty(kv_heads, queries, count, dtype=q.dtype)
    out_np, where = out.numpy(), plain(pages, torch.int64)
    row_bytes = kv_heads * width * region.element_size() * (1 if other is None else 2)
    shares = max(1, min(torch.get_num_threads(), count * row_bytes // MIN_SHARE_BYTES))
    span = -(-count // shares)
    passes = [(q, region)] if other is None or q_other is None else [(q, region), (q_other, other)]

    def share(i: int) -> None:
        first, stop = i * span, min((i + 1) * span, count)
        for number, (rows, held) in enumerate(ready):
            _scores(out_np, rows, held, where, region.shape[1], width, first, stop, number > 0)

    ready = [(plain(rows, q.dtype), flat(held)) for rows, held in passes]
    run_shares(share, shares)
    return out


@torch.library.custom_op("plait::unit_scores", mutates_args=())
def unit_scores_op(
    q: Tensor,
    region: Tensor,
    pages: Tensor,
    count: int,
    q_other: Tensor | None,
    other: Tensor | None,
) -> Tensor:
    """Run it behind torch's dispatcher: Numba on CPU, torch by gathering elsewhere."""
    score = _scores_cpu if q.device.type == "cpu" else unit_scores_reference
    return score(q, region, pages, count, q_other, other)


@unit_scores_op.register_fake
def _(q, region, pages, count, q_other, other):
    return q.new_empty(*q.shape[:2], count)


def unit_scores(
    q: Tensor,
    region: Tensor,
    pages: Tensor,
    count: int,
    q_other: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Give `q . region[unit]` for the first `count` units of a sequence, plus `q_other . other[unit]` if given.

    Shape:
        q, q_other `[kv_heads, queries, head_dim]` float32 or float64; region, other
        `[pool pages, units, kv_heads, head_dim]`; pages `[n]` the sequence's in order -> `[kv_heads, queries, count]`

    Raises:
        ValueError: if the shapes do not belong together.
    """
    fits = q.dim() == 3 and region.dim() == 4 and (q.shape[0], q.shape[2]) == region.shape[2:]
    if not fits or count > len(pages) * region.shape[1]:
        raise ValueError(
            f"unit_scores: q {list(q.shape)}, region {list(region.shape)} and {count} units of {len(pages)} pages do "
            "not fit; use q [kv_heads, queries, head_dim], region [pages, units, kv_heads, head_dim]"
        )
    call = _scores_cpu if direct(q) else torch.ops.plait.unit_scores
    return call(q, region, pages, count, q_other, other)
