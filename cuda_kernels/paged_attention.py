"""Attention of a few query rows per sequence over paged keys and values, in place (decode, verify).

CPU kernel in Numba: one pass over the pages in memory order for all heads and rows at once, online
softmax over chunks of tokens, split over threads by tokens (flash-decoding), merged by lse.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .exp import exp_rows, token_row
from .merge import merge_states_reference
from .scores import Interleave, attention_reference, check_attention
from .workers import run_shares

NEG_INF = float("-inf")
CHUNK_TOKENS = 16  # K and V of a chunk stay in the near caches while every head uses them
MIN_SHARE_BYTES = 1 << 20  # below this many KV bytes per thread, starting a thread costs more
FAST = {"reassoc", "contract", "nsz", "arcp"}  # not nnan/ninf: -inf is the mask


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
        stop = min(int(hi[rows].max()) if rows.stop > rows.start else 0, pages.numel() * k_pages.shape[1])
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


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy", inline="never")
def _dots(q, first, count, row, out, j):
    """out[first + i, j] = q[first + i] . row for `count` queries, four at a time."""
    d = row.shape[0]
    i = first
    stop = first + count
    while i + 4 <= stop:
        q0, q1, q2, q3 = q[i], q[i + 1], q[i + 2], q[i + 3]
        a0 = q.dtype.type(0)
        a1 = q.dtype.type(0)
        a2 = q.dtype.type(0)
        a3 = q.dtype.type(0)
        for x in range(d):
            kx = row[x]
            a0 += q0[x] * kx
            a1 += q1[x] * kx
            a2 += q2[x] * kx
            a3 += q3[x] * kx
        out[i, j] = a0
        out[i + 1, j] = a1
        out[i + 2, j] = a2
        out[i + 3, j] = a3
        i += 4
    while i < stop:
        q0 = q[i]
        a0 = q.dtype.type(0)
        for x in range(d):
            a0 += q0[x] * row[x]
        out[i, j] = a0
        i += 1


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy", inline="never")
def _add4(acc, p0, p1, p2, p3, v0, v1, v2, v3):
    for x in range(acc.shape[0]):
        acc[x] += p0 * v0[x] + p1 * v1[x] + p2 * v2[x] + p3 * v3[x]


@njit(nogil=True, cache=True, error_model="numpy")
def _bend(s, n, head, pos, softcap, slopes, q_pos):
    """Apply soft cap and ALiBi to one row of scores."""
    if softcap > 0:
        for j in range(n):
            s[j] = softcap * np.tanh(s[j] / softcap)
    if slopes.shape[0] > 0:
        for j in range(n):
            s[j] += slopes[head] * (pos[j] - q_pos)


@njit(nogil=True, cache=True, error_model="numpy")
def _soften(s, e, n, acc, m, l, i, lo, hi, token):  # noqa: E741
    """Online softmax of one query over a chunk: scores become weights, acc is rescaled."""
    top = m[i]
    for j in range(n):
        if token + j < lo or token + j >= hi:
            s[j] = NEG_INF
        elif s[j] > top or s[j] != s[j]:
            top = s[j]
    if top == NEG_INF:
        for j in range(n):
            s[j] = 0
        return
    total = exp_rows(s, e, n, top)
    if top != m[i]:
        keep = np.exp(m[i] - top)
        l[i] *= keep
        for x in range(acc.shape[0]):
            acc[x] *= keep
        m[i] = top
    l[i] += total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _attend_rows(
    q, acc, m, l, k, v, pages, page_tokens, kv_heads, head_dim, value_stride, lo, hi, first, stop,
    s, e, scratch, softcap, slopes, q_pos, run, shards, shard,
):  # fmt: skip  # noqa: E741
    """Attend for all rows of one sequence over its tokens `[first, stop)`.

    Queries are `[kv_heads, rows * group, d]` flattened, so one key row serves `rows * group` dots.
    """
    queries = q.shape[0] // kv_heads  # rows * group
    rows = lo.shape[0]
    group = queries // rows
    value_dim = acc.shape[1]
    pos = np.empty(CHUNK_TOKENS, np.int64)
    slot = np.zeros(CHUNK_TOKENS, np.int64)
    for token in range(first, stop, CHUNK_TOKENS):
        n = min(CHUNK_TOKENS, stop - token)
        for j in range(n):
            t = token + j
            slot[j] = np.int64(pages[t // page_tokens]) * page_tokens + t % page_tokens
            pos[j] = (t // run) * run * shards + shard * run + t % run
            whole = token_row(k, slot[j] * kv_heads * head_dim, kv_heads * head_dim, scratch[0])
            for h in range(kv_heads):
                _dots(q, h * queries, queries, whole[h * head_dim : (h + 1) * head_dim], s, j)
        for j in range(n, (n + 3) // 4 * 4):  # the tail of the last four weighs nothing
            slot[j] = slot[n - 1]
        for i in range(q.shape[0]):
            r = (i % queries) // group
            head = i // queries * group + i % group
            _bend(s[i], n, head, pos, softcap, slopes, q_pos[r])
            _soften(s[i], e, n, acc[i], m, l, i, lo[r], hi[r], token)
            for j in range(n, (n + 3) // 4 * 4):
                s[i, j] = 0
        width = kv_heads * value_stride
        for j in range(0, n, 4):
            w0 = token_row(v, slot[j] * width, width, scratch[0])
            w1 = token_row(v, slot[j + 1] * width, width, scratch[1])
            w2 = token_row(v, slot[j + 2] * width, width, scratch[2])
            w3 = token_row(v, slot[j + 3] * width, width, scratch[3])
            for h in range(kv_heads):
                a, b = h * value_stride, h * value_stride + value_dim
                for i in range(h * queries, (h + 1) * queries):
                    _add4(
                        acc[i], s[i, j], s[i, j + 1], s[i, j + 2], s[i, j + 3],
                        w0[a:b], w1[a:b], w2[a:b], w3[a:b],
                    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def _attend_span(
    o, lse, q, k, v, q_indptr, kv_indptr, kv_indices, lo, hi, starts, span_first, span_stop,
    page_tokens, kv_heads, value_stride, softcap, slopes, q_pos, run, shards, shard,
):  # fmt: skip
    """Attend over the tokens `[span_first, span_stop)` of all sequences laid end to end.

    `starts[s]` is where sequence s begins in that line; its tokens begin at its smallest lo.
    Writes normalised o and lse of this span alone.
    """
    heads, head_dim, value_dim = q.shape[1], q.shape[2], o.shape[2]
    group = heads // kv_heads
    width = kv_heads * max(head_dim, value_stride)
    scratch = np.empty((4, width), q.dtype)
    e = np.empty(CHUNK_TOKENS, np.int32)
    for n in range(q_indptr.shape[0] - 1):
        r0, rows = q_indptr[n], q_indptr[n + 1] - q_indptr[n]
        low = np.int64(1) << 62
        for r in range(rows):
            if hi[r0 + r] > lo[r0 + r]:
                low = min(low, lo[r0 + r])
        first = low + max(span_first - starts[n], 0)
        stop = low + min(span_stop, starts[n + 1]) - starts[n]
        for r in range(rows):
            for h in range(heads):
                lse[r0 + r, h] = NEG_INF
                o[r0 + r, h, :] = 0
        if starts[n + 1] == starts[n] or stop <= first:
            continue
        flat = np.empty((heads * rows, head_dim), q.dtype)
        acc = np.zeros((heads * rows, value_dim), q.dtype)
        for r in range(rows):
            for h in range(heads):
                flat[(h // group) * rows * group + r * group + h % group] = q[r0 + r, h]
        m = np.full(heads * rows, NEG_INF, q.dtype)
        total = np.zeros(heads * rows, q.dtype)
        s = np.zeros((heads * rows, CHUNK_TOKENS), q.dtype)
        _attend_rows(
            flat, acc, m, total, k, v, kv_indices[kv_indptr[n] : kv_indptr[n + 1]], page_tokens,
            kv_heads, head_dim, value_stride, lo[r0 : r0 + rows], hi[r0 : r0 + rows], first, stop,
            s, e, scratch, softcap, slopes, q_pos[r0 : r0 + rows], run, shards, shard,
        )  # fmt: skip
        for r in range(rows):
            for h in range(heads):
                i = (h // group) * rows * group + r * group + h % group
                if m[i] != NEG_INF:
                    lse[r0 + r, h] = m[i] + np.log(total[i])
                    for x in range(value_dim):
                        o[r0 + r, h, x] = acc[i, x] / total[i]


def _flat(pages: Tensor) -> np.ndarray:
    """View contiguous pages as one numpy row; 16-bit floats as their bits."""
    if pages.dtype == torch.bfloat16:
        pages = pages.view(torch.uint16)
    elif pages.dtype == torch.float16:
        pages = pages.view(torch.int16)
    return pages.view(-1).numpy()


def _starts(q_indptr: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Lay the visible tokens of all sequences end to end; return where each begins."""
    seen = hi > lo
    low = np.where(seen, lo, np.iinfo(np.int64).max)
    high = np.where(seen, hi, 0)
    counts = np.zeros(q_indptr.shape[0] - 1, np.int64)
    full = np.flatnonzero(np.diff(q_indptr) > 0)  # reduceat cannot take empty runs
    if full.size:
        first = np.minimum.reduceat(low, q_indptr[full])
        last = np.maximum.reduceat(high, q_indptr[full])
        counts[full] = np.maximum(last - np.minimum(first, last), 0)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _attend_cpu(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, rule: Interleave, value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, heads, _ = q.shape
    page_tokens, kv_heads = k_pages.shape[1], k_pages.shape[2]
    scaled = (q.detach().to(work) * scale).contiguous().numpy()
    k, v = _flat(k_pages), _flat(v_pages)
    q_ptr, lows, highs = q_indptr.numpy(), lo.numpy(), hi.numpy()
    starts = _starts(q_ptr, lows, highs)
    token_bytes = kv_heads * (k_pages.shape[3] + value_dim) * k_pages.element_size()
    threads = torch.get_num_threads()
    shares = max(1, min(threads, int(starts[-1]) * token_bytes // MIN_SHARE_BYTES))
    span = -(-int(starts[-1]) // (shares * page_tokens)) * page_tokens
    slopes = scaled[0, :0, 0] if alibi_slopes is None else alibi_slopes.to(work).numpy()
    positions = lows if q_pos is None else q_pos.numpy()
    o = torch.empty(shares, rows, heads, value_dim, dtype=work)
    lse = torch.empty(shares, rows, heads, dtype=work)
    o_np, lse_np = o.numpy(), lse.numpy()
    kv_ptr, kv_idx = kv_indptr.numpy(), kv_indices.numpy()

    def share(i: int) -> None:
        _attend_span(
            o_np[i], lse_np[i], scaled, k, v, q_ptr, kv_ptr, kv_idx, lows, highs, starts,
            i * span, (i + 1) * span, page_tokens, kv_heads, v_pages.shape[3], softcap, slopes,
            positions, rule.run, rule.shards, rule.shard,
        )  # fmt: skip

    run_shares(share, shares)
    if shares == 1:
        return o[0].to(q.dtype), lse[0]
    merged, merged_lse = merge_states_reference(o, lse)
    return merged.to(q.dtype), merged_lse


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
      alibi_slopes, q_pos, run, shards, shard, value_dim):  # fmt: skip  # noqa: ANN001
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
    return torch.ops.plait.paged_attention(
        q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, cap,
        alibi_slopes, q_pos, rule.run, rule.shards, rule.shard, value_dim,
    )  # fmt: skip
