"""What CPU kernels of decode attention share: rows of queries against chunks of tokens, by online softmax.

Tokens that rows of any sequence see lie end to end, and a span is a piece of that line (flash-decoding): each gives
an output and lse of its own, merged after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .exp import exp_rows
from .halves import widen
from .kernel_cache import njit
from .merge import merge_plain
from .numbers import plain
from .row_products import dots_of_four, dots_of_one, sums_of_four, sums_of_one
from .workers import run_rows

NEG_INF = float("-inf")
CHUNK_TOKENS = 32
FAST = {"reassoc", "contract", "nsz", "arcp"}  # not nnan/ninf: -inf is the mask


@njit(nogil=True)
def starts_of(q_indptr, lo, hi):
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


@njit(nogil=True, fastmath=FAST, error_model="numpy", inline="never")
def dots4(q0, q1, q2, q3, row):
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
def dot(q0, row):
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
def score_row(s, j, q, first, stop, row):
    """Write token j's scores of the queries `[first, stop)`, which read its key together."""
    fours = first + (stop - first) // 4 * 4
    for i in range(first, fours, 4):
        a, b, c, d = dots4(q[i], q[i + 1], q[i + 2], q[i + 3], row)
        s[i, j], s[i + 1, j], s[i + 2, j], s[i + 3, j] = a, b, c, d
    for i in range(fours, stop):
        s[i, j] = dot(q[i], row)


@njit(nogil=True, error_model="numpy")
def soften_chunk(
    s, n, acc, tops, sums, kv_heads, lo, hi, token, pos, softcap, slopes, q_pos
):  # fmt: skip
    """Make weights of a chunk's scores, those of its first `n` tokens; the tail of the last four weighs nothing."""
    queries = s.shape[0] // kv_heads  # rows * group
    group = queries // lo.shape[0]
    for i in range(s.shape[0]):
        r = (i % queries) // group
        _bend(s[i], n, i // queries * group + i % group, pos, softcap, slopes, q_pos[r])
        _soften(s[i], n, acc[i], tops, sums, i, lo[r], hi[r], token)
        for j in range(n, (n + 3) // 4 * 4):
            s[i, j] = 0


@njit(nogil=True, error_model="numpy")
def add_rows(acc, s, j, first, stop, r0, r1, r2, r3):
    """Add the values of four tokens from j on to the outputs of the queries `[first, stop)`."""
    fours = first + (stop - first) // 4 * 4
    for i in range(first, fours, 4):
        _add44(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], s[i : i + 4], j, r0, r1, r2, r3)
    for i in range(fours, stop):
        _add14(acc[i], s[i], j, r0, r1, r2, r3)


@njit(nogil=True)
def score_pair(s, j, q, first, stop, a, b, like):
    """Write the scores of tokens j and the next, whose keys, elements of `like`, are whole vectors at addresses."""
    fours, size = first + (stop - first) // 4 * 4, s.itemsize
    to, s_step = np.int64(s.ctypes.data) + j * size, s.shape[1] * size
    asked, width, q_step = np.int64(q.ctypes.data), q.shape[1], q.shape[1] * size
    for i in range(first, fours, 4):
        dots_of_four(to + i * s_step, s_step, asked + i * q_step, q_step, a, b, width, q, like)
    for i in range(fours, stop):
        dots_of_one(to + i * s_step, s_step, asked + i * q_step, q_step, a, b, width, q, like)


@njit(nogil=True)
def add_four(acc, s, j, first, stop, a, b, c, d, like):
    """Add the values of four tokens from j on, elements of `like`, which are whole vectors at addresses."""
    fours, size = first + (stop - first) // 4 * 4, s.itemsize
    of, s_step = np.int64(s.ctypes.data) + j * size, s.shape[1] * size
    to, width, step = np.int64(acc.ctypes.data), acc.shape[1], acc.shape[1] * size
    for i in range(first, fours, 4):
        sums_of_four(
            to + i * step, step, of + i * s_step, s_step, a, b, c, d, width, acc, like
        )  # fmt: skip
    for i in range(fours, stop):
        sums_of_one(
            to + i * step, step, of + i * s_step, s_step, a, b, c, d, width, acc, like
        )  # fmt: skip


@njit(nogil=True)
def part_of(n, q_indptr, lo, hi, starts, span_first, span_stop):
    """The tokens of sequence n that a span covers, `first, stop`; empty if none.

    `starts[n]` is where the sequence begins in the line of all; its tokens there begin at its smallest lo.
    """
    low = np.int64(1) << 62
    for r in range(q_indptr[n], q_indptr[n + 1]):
        if hi[r] > lo[r]:
            low = min(low, lo[r])
    if starts[n + 1] == starts[n]:
        return np.int64(0), np.int64(0)
    return low + max(span_first - starts[n], 0), low + min(span_stop, starts[n + 1]) - starts[n]


@njit(nogil=True)
def _place(r, h, rows, group):
    """Where query head h of row r stands: one key serves the `rows * group` queries that read it."""
    return (h // group) * rows * group + r * group + h % group


@njit(nogil=True)
def open_rows(q, value_dim, kv_heads):
    """Give a sequence's queries flat, and room for scores and sums.

    Shape: q `[rows, heads, d]` -> `[kv_heads * rows * group, d]`, acc, s, tops, sums likewise
    """
    rows, heads, width = q.shape
    flat = np.empty((heads * rows, width), q.dtype)
    acc = np.zeros((heads * rows, value_dim), q.dtype)
    s = np.empty((heads * rows, CHUNK_TOKENS), q.dtype)
    tops, sums = np.full(heads * rows, NEG_INF, q.dtype), np.zeros(heads * rows, q.dtype)
    for r in range(rows):
        for h in range(heads):
            i = _place(r, h, rows, heads // kv_heads)
            for x in range(width):
                flat[i, x] = q[r, h, x]
    return flat, acc, s, tops, sums


@njit(nogil=True)
def clear_rows(o, lse):
    """Set o and lse to nothing."""
    for r in range(o.shape[0]):
        for h in range(o.shape[1]):
            lse[r, h] = NEG_INF
            for x in range(o.shape[2]):
                o[r, h, x] = 0


@njit(nogil=True, error_model="numpy")
def close_rows(o, lse, acc, tops, sums, kv_heads):
    """Write normalised o and lse of a sequence's rows that saw something."""
    rows, heads, width = o.shape
    for r in range(rows):
        for h in range(heads):
            i = _place(r, h, rows, heads // kv_heads)
            if tops[i] != NEG_INF:
                lse[r, h] = tops[i] + np.log(sums[i])
                for x in range(width):
                    o[r, h, x] = acc[i, x] / sums[i]


class AskedRows(NamedTuple):
    """Rows of queries, times the scale, and the pages and tokens that they see, as kernels read them."""

    q: np.ndarray
    q_indptr: np.ndarray
    kv_indptr: np.ndarray
    kv_indices: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    starts: np.ndarray

    @property
    def tokens(self) -> int:
        """Of the line of all sequences."""
        return int(self.starts[-1])


def asked_rows(
    q: Tensor, q_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, lo: Tensor, hi: Tensor,
    scale: float,
) -> AskedRows:  # fmt: skip
    """Bring what a caller gives to one precision and layout."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled = plain(q.to(work) * scale, work)
    q_ptr, low, high = (plain(t, torch.int64) for t in (q_indptr, lo, hi))
    kv_ptr, kv_idx = (plain(t, torch.int32) for t in (kv_indptr, kv_indices))
    return AskedRows(scaled, q_ptr, kv_ptr, kv_idx, low, high, starts_of(q_ptr, low, high))


def merged_spans(
    attend: Callable[[np.ndarray, np.ndarray, int, int], object],
    rows: AskedRows, value_dim: int, spans: int, page_tokens: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cut the line of all tokens into so many spans, attend to each in threads, and merge.

    Args:
        attend: called with o, lse, first, stop; writes what a span alone gives.
    """
    step = -(-rows.tokens // (spans * page_tokens)) * page_tokens
    work = torch.from_numpy(rows.q).dtype
    o = torch.empty(spans, *rows.q.shape[:2], value_dim, dtype=work)
    lse = torch.empty(spans, *rows.q.shape[:2], dtype=work)
    o_np, lse_np = o.numpy(), lse.numpy()

    def part(a: int, b: int) -> None:
        for i in range(a, b):
            attend(o_np[i], lse_np[i], i * step, (i + 1) * step)

    run_rows(part, spans, 1)
    if spans == 1:
        return o[0].to(dtype), lse[0]
    merged, merged_lse = merge_plain(o, lse)
    return merged.to(dtype), merged_lse
