"""Attention of a few query rows per sequence over paged keys and values, in place (decode, verify).

CPU kernel in Numba: one pass over the pages in memory order for all heads and rows at once, online
softmax over chunks of tokens, split over threads by tokens (flash-decoding), merged by lse.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .exp import exp_rows
from .halves import widen
from .kernel_cache import njit
from .merge import direct, merge_plain
from .scores import Interleave, attention_reference, check_attention
from .workers import run_shares

NEG_INF = float("-inf")
CHUNK_TOKENS = 32
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


@njit(nogil=True, fastmath=FAST, error_model="numpy", inline="never")
def _dots4(q0, q1, q2, q3, row):
    """Four dot products with one read (and one widening) of a key row."""
    a0 = q0[0] * 0
    a1, a2, a3 = a0, a0, a0
    for x in range(q0.shape[0]):
        kx = widen(row[x])
        a0 += q0[x] * kx
        a1 += q1[x] * kx
        a2 += q2[x] * kx
        a3 += q3[x] * kx
    return a0, a1, a2, a3


@njit(nogil=True, fastmath=FAST, error_model="numpy", inline="never")
def _dot(q0, row):
    a0 = q0[0] * 0
    for x in range(q0.shape[0]):
        a0 += q0[x] * widen(row[x])
    return a0


@njit(nogil=True, fastmath=FAST, error_model="numpy", inline="never")
def _add44(acc0, acc1, acc2, acc3, p, j, r0, r1, r2, r3):
    """Add four weighted value rows to each of four accumulators, each row read once."""
    p00, p01, p02, p03 = p[0, j], p[0, j + 1], p[0, j + 2], p[0, j + 3]
    p10, p11, p12, p13 = p[1, j], p[1, j + 1], p[1, j + 2], p[1, j + 3]
    p20, p21, p22, p23 = p[2, j], p[2, j + 1], p[2, j + 2], p[2, j + 3]
    p30, p31, p32, p33 = p[3, j], p[3, j + 1], p[3, j + 2], p[3, j + 3]
    for x in range(acc0.shape[0]):
        v0, v1, v2, v3 = widen(r0[x]), widen(r1[x]), widen(r2[x]), widen(r3[x])
        acc0[x] += p00 * v0 + p01 * v1 + p02 * v2 + p03 * v3
        acc1[x] += p10 * v0 + p11 * v1 + p12 * v2 + p13 * v3
        acc2[x] += p20 * v0 + p21 * v1 + p22 * v2 + p23 * v3
        acc3[x] += p30 * v0 + p31 * v1 + p32 * v2 + p33 * v3


@njit(nogil=True, fastmath=FAST, error_model="numpy", inline="never")
def _add14(acc, p, j, r0, r1, r2, r3):
    p0, p1, p2, p3 = p[j], p[j + 1], p[j + 2], p[j + 3]
    for x in range(acc.shape[0]):
        acc[x] += (
            p0 * widen(r0[x]) + p1 * widen(r1[x])
            + p2 * widen(r2[x]) + p3 * widen(r3[x])
        )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _bend(s, n, head, pos, softcap, slopes, q_pos):
    """Apply soft cap and ALiBi to one row of scores."""
    if softcap > 0:
        for j in range(n):
            s[j] = softcap * np.tanh(s[j] / softcap)
    if slopes.shape[0] > 0:
        for j in range(n):
            s[j] += slopes[head] * (pos[j] - q_pos)


@njit(nogil=True, error_model="numpy")
def _soften(s, n, acc, tops, sums, i, lo, hi, token):
    """Online softmax of one query over a chunk: scores become weights, acc is rescaled."""
    top = tops[i]
    for j in range(n):
        if token + j < lo or token + j >= hi:
            s[j] = NEG_INF
        elif s[j] > top or s[j] != s[j]:
            top = s[j]
    if top == NEG_INF:
        for j in range(n):
            s[j] = 0
        return
    if top != top:  # a NaN score must reach the output, whatever the fast exp makes of it
        for j in range(n):
            s[j] = top
        total = top
    else:
        total = exp_rows(s, n, top)
    if top != tops[i]:
        keep = np.exp(tops[i] - top)
        sums[i] *= keep
        for x in range(acc.shape[0]):
            acc[x] *= keep
        tops[i] = top
    sums[i] += total


@njit(nogil=True, error_model="numpy")
def _attend_rows(
    q, acc, tops, sums, k, v, pages, page_tokens, kv_heads, k_width, v_width, lo, hi, first, stop,
    s, softcap, slopes, q_pos, run, shards, shard,
):  # fmt: skip
    """Attend for all rows of one sequence over its tokens `[first, stop)`.

    Queries are `[kv_heads, rows * group, d]` flattened: one key row serves `rows * group` dots.
    """
    queries = q.shape[0] // kv_heads  # rows * group
    fours = queries // 4 * 4
    group = queries // lo.shape[0]
    pos = np.empty(CHUNK_TOKENS, np.int64)
    slot = np.empty(CHUNK_TOKENS, np.int64)
    for token in range(first, stop, CHUNK_TOKENS):
        n = min(CHUNK_TOKENS, stop - token)
        for j in range(n):
            t = token + j
            slot[j] = (np.int64(pages[t // page_tokens]) * page_tokens + t % page_tokens) * kv_heads
            pos[j] = (t // run) * run * shards + shard * run + t % run
            for h in range(kv_heads):
                row = k[(slot[j] + h) * k_width : (slot[j] + h + 1) * k_width]
                for i in range(h * queries, h * queries + fours, 4):
                    a, b, c, d = _dots4(q[i], q[i + 1], q[i + 2], q[i + 3], row)
                    s[i, j], s[i + 1, j], s[i + 2, j], s[i + 3, j] = a, b, c, d
                for i in range(h * queries + fours, (h + 1) * queries):
                    s[i, j] = _dot(q[i], row)
        for i in range(q.shape[0]):
            r = (i % queries) // group
            _bend(s[i], n, i // queries * group + i % group, pos, softcap, slopes, q_pos[r])
            _soften(s[i], n, acc[i], tops, sums, i, lo[r], hi[r], token)
            for j in range(n, (n + 3) // 4 * 4):  # the tail of the last four weighs nothing
                s[i, j] = 0
        for j in range(n, (n + 3) // 4 * 4):
            slot[j] = slot[n - 1]
        for j in range(0, n, 4):
            for h in range(kv_heads):
                f0, f1 = (slot[j] + h) * v_width, (slot[j + 1] + h) * v_width
                f2, f3 = (slot[j + 2] + h) * v_width, (slot[j + 3] + h) * v_width
                r0, r1 = v[f0 : f0 + v_width], v[f1 : f1 + v_width]
                r2, r3 = v[f2 : f2 + v_width], v[f3 : f3 + v_width]
                for i in range(h * queries, h * queries + fours, 4):
                    _add44(
                        acc[i], acc[i + 1], acc[i + 2], acc[i + 3], s[i : i + 4], j,
                        r0, r1, r2, r3,
                    )  # fmt: skip
                for i in range(h * queries + fours, (h + 1) * queries):
                    _add14(acc[i], s[i], j, r0, r1, r2, r3)


@njit(nogil=True, error_model="numpy")
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
                for x in range(value_dim):
                    o[r0 + r, h, x] = 0
        if starts[n + 1] == starts[n] or stop <= first:
            continue
        flat = np.empty((heads * rows, head_dim), q.dtype)
        acc = np.empty((heads * rows, value_dim), q.dtype)
        s = np.empty((heads * rows, CHUNK_TOKENS), q.dtype)
        tops = np.empty(heads * rows, q.dtype)
        sums = np.empty(heads * rows, q.dtype)
        for r in range(rows):
            for h in range(heads):
                i = (h // group) * rows * group + r * group + h % group
                tops[i], sums[i] = NEG_INF, 0
                for x in range(head_dim):
                    flat[i, x] = q[r0 + r, h, x]
                for x in range(value_dim):
                    acc[i, x] = 0
        _attend_rows(
            flat, acc, tops, sums, k, v, kv_indices[kv_indptr[n] : kv_indptr[n + 1]], page_tokens,
            kv_heads, head_dim, value_stride, lo[r0 : r0 + rows], hi[r0 : r0 + rows], first, stop,
            s, softcap, slopes, q_pos[r0 : r0 + rows], run, shards, shard,
        )  # fmt: skip
        for r in range(rows):
            for h in range(heads):
                i = (h // group) * rows * group + r * group + h % group
                if tops[i] != NEG_INF:
                    lse[r0 + r, h] = tops[i] + np.log(sums[i])
                    for x in range(value_dim):
                        o[r0 + r, h, x] = acc[i, x] / sums[i]


def _flat(pages: Tensor) -> np.ndarray:
    """View contiguous pages as one numpy row; 16-bit floats as their bits."""
    if not pages.is_contiguous():
        raise ValueError(
            f"pages {list(pages.shape)} with strides {pages.stride()} are read in place and must be contiguous"
        )
    if pages.dtype == torch.bfloat16:
        pages = pages.view(torch.uint16)
    elif pages.dtype == torch.float16:
        pages = pages.view(torch.int16)
    return pages.view(-1).numpy()


def _plain(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Give one dtype and layout to the compiler: each other combination is one more compilation."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        tensor = tensor.to(dtype).contiguous()
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


@njit(nogil=True)
def _starts(q_indptr, lo, hi):
    """Lay the visible tokens of all sequences end to end; return where each begins."""
    starts = np.empty(q_indptr.shape[0], np.int64)
    starts[0] = 0
    for n in range(q_indptr.shape[0] - 1):
        low, high = np.int64(1) << 62, np.int64(0)
        for r in range(q_indptr[n], q_indptr[n + 1]):
            if hi[r] > lo[r]:
                low, high = min(low, lo[r]), max(high, hi[r])
        starts[n + 1] = starts[n] + max(high - low, 0)
    return starts


def _attend_cpu(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, rule: Interleave, value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, heads, _ = q.shape
    page_tokens, kv_heads = k_pages.shape[1], k_pages.shape[2]
    scaled = _plain(q * scale if q.dtype == work else q.to(work) * scale, work)
    k, v = _flat(k_pages), _flat(v_pages)
    q_ptr, lows, highs = (_plain(t, torch.int64) for t in (q_indptr, lo, hi))
    starts = _starts(q_ptr, lows, highs)
    token_bytes = kv_heads * (k_pages.shape[3] + value_dim) * k_pages.element_size()
    threads = torch.get_num_threads()
    shares = max(1, min(threads, int(starts[-1]) * token_bytes // MIN_SHARE_BYTES))
    span = -(-int(starts[-1]) // (shares * page_tokens)) * page_tokens
    slopes = np.empty(0, scaled.dtype) if alibi_slopes is None else _plain(alibi_slopes, work)
    positions = lows if q_pos is None else _plain(q_pos, torch.int64)
    o = torch.empty(shares, rows, heads, value_dim, dtype=work)
    lse = torch.empty(shares, rows, heads, dtype=work)
    o_np, lse_np = o.numpy(), lse.numpy()
    kv_ptr, kv_idx = _plain(kv_indptr, torch.int32), _plain(kv_indices, torch.int32)

    def share(i: int) -> None:
        _attend_span(
            o_np[i], lse_np[i], scaled, k, v, q_ptr, kv_ptr, kv_idx, lows, highs, starts,
            i * span, (i + 1) * span, page_tokens, kv_heads, v_pages.shape[3], softcap, slopes,
            positions, rule.run, rule.shards, rule.shard,
        )  # fmt: skip

    run_shares(share, shares)
    if shares == 1:
        return o[0].to(q.dtype), lse[0]
    merged, merged_lse = merge_plain(o, lse)
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
