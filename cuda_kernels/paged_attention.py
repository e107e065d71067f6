"""Attention of a few query rows per sequence over paged keys and values, in place (decode, verify).

CPU kernel in Numba: one pass over the pages in memory order for all heads and rows at once, online
softmax over chunks of tokens, split over threads by tokens (flash-decoding), merged by lse.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .decode_spans import (
    CHUNK_TOKENS,
    add_four,
    add_rows,
    asked_rows,
    clear_rows,
    close_rows,
    merged_spans,
    open_rows,
    part_of,
    score_pair,
    score_row,
    soften_chunk,
)
from .kernel_cache import njit
from .merge import direct
from .numbers import flat, plain
from .row_products import LANES
from .scores import Interleave, attention_reference, check_attention

MIN_SHARE_BYTES = 1 << 20  # below this many KV bytes per thread, starting a thread costs more


def paged_attention_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, q_pos: Tensor | None = None,
    interleave: Interleave | None = None, value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend in plain torch by gathering each sequence's pages; any device, differentiable.

    Shape: as `paged_attention`.
    """
    value_dim = v_pages.shape[-1] if value_dim is None else value_dim
    outs, lses = [], []
    for s in range(q_indptr.numel() - 1):
        rows = slice(int(q_indptr[s]), int(q_indptr[s + 1]))
        pages = kv_indices[int(kv_indptr[s]) : int(kv_indptr[s + 1])].long()
        stop = min(
            int(hi[rows].max()) if rows.stop > rows.start else 0, pages.numel() * k_pages.shape[1]
        )
        k = k_pages[pages].flatten(0, 1)[: max(stop, 0)]
        v = v_pages[pages].flatten(0, 1)[: max(stop, 0), :, :value_dim]
        o, lse = attention_reference(
            q[rows], k, v, lo[rows], hi[rows], scale, softcap, alibi_slopes,
            None if q_pos is None else q_pos[rows], interleave,
        )  # fmt: skip
        outs.append(o)
        lses.append(lse)
    if not outs:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_zeros(0, q.shape[1], value_dim), q.new_zeros(0, q.shape[1], dtype=work)
    return torch.cat(outs), torch.cat(lses)


@njit(nogil=True, error_model="numpy")
def _score_chunk(q, k, width, slot, n, s, kv_heads, queries):
    """Score the keys of a chunk, in memory order."""
    at, each = np.int64(k.ctypes.data), width * k.itemsize
    step = 2 if width % LANES == 0 else 1
    for j in range(0, n, step):
        for h in range(kv_heads):
            if step == 2:
                a, b = at + (slot[j] + h) * each, at + (slot[j + 1] + h) * each
                score_pair(s, j, q, h * queries, (h + 1) * queries, a, b, k)
            else:
                row = k[(slot[j] + h) * width : (slot[j] + h + 1) * width]
                score_row(s, j, q, h * queries, (h + 1) * queries, row)


@njit(nogil=True, error_model="numpy")
def _add_chunk(acc, v, width, slot, n, s, kv_heads, queries):
    """Add the weighted values of a chunk; `width` is from one to the next, of which some are read."""
    at, each, whole = np.int64(v.ctypes.data), width * v.itemsize, acc.shape[1] % LANES == 0
    for j in range(0, n, 4):
        for h in range(kv_heads):
            if whole:
                a, b = at + (slot[j] + h) * each, at + (slot[j + 1] + h) * each
                c, d = at + (slot[j + 2] + h) * each, at + (slot[j + 3] + h) * each
                add_four(acc, s, j, h * queries, (h + 1) * queries, a, b, c, d, v)
                continue
            f0, f1 = (slot[j] + h) * width, (slot[j + 1] + h) * width
            f2, f3 = (slot[j + 2] + h) * width, (slot[j + 3] + h) * width
            r0, r1 = v[f0 : f0 + width], v[f1 : f1 + width]
            r2, r3 = v[f2 : f2 + width], v[f3 : f3 + width]
            add_rows(acc, s, j, h * queries, (h + 1) * queries, r0, r1, r2, r3)


@njit(nogil=True, error_model="numpy")
def _attend_rows(
    q, acc, tops, sums, k, v, pages, page_tokens, kv_heads, k_width, v_width, lo, hi, first, stop,
    s, softcap, slopes, q_pos, run, shards, shard,
):  # fmt: skip
    """Attend for all rows of one sequence over its tokens `[first, stop)`."""
    queries = q.shape[0] // kv_heads  # rows * group
    pos = np.empty(CHUNK_TOKENS, np.int64)
    slot = np.empty(CHUNK_TOKENS, np.int64)
    for token in range(first, stop, CHUNK_TOKENS):
        n = min(CHUNK_TOKENS, stop - token)
        for j in range(n):
            t = token + j
            slot[j] = (np.int64(pages[t // page_tokens]) * page_tokens + t % page_tokens) * kv_heads
            pos[j] = (t // run) * run * shards + shard * run + t % run
        for j in range(n, (n + 3) // 4 * 4):
            slot[j] = slot[n - 1]
        _score_chunk(q, k, k_width, slot, n, s, kv_heads, queries)
        soften_chunk(s, n, acc, tops, sums, kv_heads, lo, hi, token, pos, softcap, slopes, q_pos)
        _add_chunk(acc, v, v_width, slot, n, s, kv_heads, queries)


@njit(nogil=True, error_model="numpy")
def _attend_span(
    o, lse, q, q_indptr, kv_indptr, kv_indices, lo, hi, starts, k, v, span_first, span_stop,
    page_tokens, kv_heads, value_stride, softcap, slopes, q_pos, run, shards, shard,
):  # fmt: skip
    """Attend over the tokens `[span_first, span_stop)` of all sequences laid end to end.

    Writes normalised o and lse of this span alone.
    """
    for n in range(q_indptr.shape[0] - 1):
        a, b = q_indptr[n], q_indptr[n + 1]
        clear_rows(o[a:b], lse[a:b])
        first, stop = part_of(n, q_indptr, lo, hi, starts, span_first, span_stop)
        if stop <= first:
            continue
        queries, acc, s, tops, sums = open_rows(q[a:b], o.shape[2], kv_heads)
        _attend_rows(
            queries, acc, tops, sums, k, v, kv_indices[kv_indptr[n] : kv_indptr[n + 1]], page_tokens,
            kv_heads, q.shape[2], value_stride, lo[a:b], hi[a:b], first, stop, s, softcap, slopes,
            q_pos[a:b], run, shards, shard,
        )  # fmt: skip
        close_rows(o[a:b], lse[a:b], acc, tops, sums, kv_heads)


def _attend_cpu(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, rule: Interleave, value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    page_tokens, kv_heads = k_pages.shape[1], k_pages.shape[2]
    rows = asked_rows(q, q_indptr, kv_indptr, kv_indices, lo, hi, scale)
    k, v = flat(k_pages), flat(v_pages)
    token_bytes = kv_heads * (k_pages.shape[3] + value_dim) * k_pages.element_size()
    threads = torch.get_num_threads()
    spans = max(1, min(threads, rows.tokens * token_bytes // MIN_SHARE_BYTES))
    slopes = np.empty(0, rows.q.dtype)
    if alibi_slopes is not None:
        slopes = plain(alibi_slopes, torch.from_numpy(rows.q).dtype)
    positions = rows.lo if q_pos is None else plain(q_pos, torch.int64)

    def attend(o: np.ndarray, lse: np.ndarray, first: int, stop: int) -> None:
        _attend_span(
            o, lse, *rows, k, v, first, stop, page_tokens, kv_heads, v_pages.shape[3], softcap,
            slopes, positions, rule.run, rule.shards, rule.shard,
        )  # fmt: skip

    return merged_spans(attend, rows, value_dim, spans, page_tokens, q.dtype)


@torch.library.custom_op("plait::paged_attention", mutates_args=())
def paged_attention_op(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, run: int, shards: int, shard: int,
    value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run paged attention without autograd: Numba on CPU, torch by gathering elsewhere."""
    rule = Interleave(run, shards, shard)
    attend = _attend_cpu if q.device.type == "cpu" else paged_attention_reference
    return attend(
        q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap,
        alibi_slopes, q_pos, rule, value_dim,
    )  # fmt: skip


@paged_attention_op.register_fake
def _(q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap,
      alibi_slopes, q_pos, run, shards, shard, value_dim):  # fmt: skip
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], value_dim), q.new_empty(q.shape[:2], dtype=work)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    q_pos: Tensor | None = None,
    interleave: Interleave | None = None,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with a few rows per sequence to paged keys and values, without copying them.

    Row r of sequence s (`q_indptr[s] <= r < q_indptr[s + 1]`) sees the local tokens
    `[lo[r], hi[r])` of the pages `kv_indices[kv_indptr[s] : kv_indptr[s + 1]]`. A row that sees
    none gives `o = 0, lse = -inf`. ALiBi adds `slope * (key position - q_pos)`, key positions by
    `interleave`. For MLA give the same pages twice with `value_dim`: V is K's first columns.
    Scores and sums are float32 (float64 for float64) whatever the pages hold.

    Shape:
        q `[rows, heads, head_dim]`, k_pages `[pages, page_tokens, kv_heads, head_dim]`,
        v_pages `[pages, page_tokens, kv_heads, >= value_dim]`, q_indptr `[seqs + 1]` int64,
        kv_indptr `[seqs + 1]` int32, kv_indices int32, lo, hi, q_pos `[rows]` int64
        -> o `[rows, heads, value_dim]`, lse `[rows, heads]` (natural log)

    Raises:
        ValueError: if shapes do not belong together, or ALiBi lacks `q_pos`.
    """
    check_attention(q, k_pages, v_pages, lo, hi, alibi_slopes, q_pos)
    rule, cap = interleave or Interleave(), float(softcap or 0.0)
    value_dim = v_pages.shape[-1] if value_dim is None else value_dim
    if torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad):
        return paged_attention_reference(
            q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, cap,
            alibi_slopes, q_pos, rule, value_dim,
        )  # fmt: skip
    if direct(q):
        return _attend_cpu(
            q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, cap,
            alibi_slopes, q_pos, rule, value_dim,
        )  # fmt: skip
    return torch.ops.plait.paged_attention(
        q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, cap,
        alibi_slopes, q_pos, rule.run, rule.shards, rule.shard, value_dim,
    )  # fmt: skip
