"""Decode attention over pages of codes in host memory, in place, and scores of their keys.

The CPU kernel of `paged_attention` with other rows: vectors of four tokens at a time become float32 that stay in
the first cache, in the order in which their codes lie in memory, and the queries of a KV head share them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .code_rows import CodeTable, room_for, write_rows
from .decode_spans import (
    CHUNK_TOKENS,
    add_four,
    asked_rows,
    clear_rows,
    close_rows,
    merged_spans,
    open_rows,
    part_of,
    score_pair,
    soften_chunk,
)
from .kernel_cache import njit
from .numbers import plain
from .workers import run_rows

FOUR = 4  # tokens decoded at once
SPAN_BYTES = 1 << 20  # of codes of a span at least,
# and this many at most: not as many as there are threads, which would change the sums
MOST_SPANS = 16


@njit(nogil=True)
def _find(pages, list_tokens, page_tokens, token, n, page, inside):
    """Find tokens: which page of the table, and where in it."""
    entry, rest = token // list_tokens, token % list_tokens
    for j in range(n):
        if list_tokens == page_tokens:
            page[j], inside[j] = pages[entry], rest
        else:
            slot = np.int64(pages[entry]) * list_tokens + rest
            page[j], inside[j] = slot // page_tokens, slot % page_tokens
        rest += 1
        if rest == list_tokens:
            entry, rest = entry + 1, 0


@njit(nogil=True, error_model="numpy")
def _score_chunk(s, q, form, table, page, inside, n, room):
    """Write the scores of a chunk's `n` tokens: keys are decoded in the order of memory."""
    queries = q.shape[0] // form.kv_heads
    tile = np.empty((FOUR, form.width), np.float32)
    at, each = np.int64(tile.ctypes.data), 4 * form.width
    for j in range(0, n, FOUR):
        last = min(n - j, FOUR) - 1
        for h in range(form.kv_heads):
            write_rows(at, form, table, page, inside, j, j + last + 1, h, *room)
            a, b = h * queries, (h + 1) * queries
            score_pair(s, j, q, a, b, at, at + min(1, last) * each, tile)
            if last > 1:
                score_pair(s, j + 2, q, a, b, at + 2 * each, at + last * each, tile)


@njit(nogil=True, error_model="numpy")
def _attend_rows(
    q, acc, tops, sums, s, k_form, k_table, v_form, v_table, pages, list_tokens, lo, hi, first,
    stop, softcap,
):  # fmt: skip
    """Attend for all rows of one sequence over its tokens `[first, stop)`."""
    kv_heads = k_form.kv_heads
    queries = q.shape[0] // kv_heads  # rows * group
    page, inside = np.empty(CHUNK_TOKENS, np.int64), np.empty(CHUNK_TOKENS, np.int64)
    k_room, v_room = room_for(k_form), room_for(v_form)
    tile = np.empty((FOUR, v_form.width), np.float32)
    at, each = np.int64(tile.ctypes.data), 4 * v_form.width
    slopes = np.empty(0, q.dtype)
    for token in range(first, stop, CHUNK_TOKENS):
        n = min(CHUNK_TOKENS, stop - token)
        _find(pages, list_tokens, k_form.page_tokens, token, n, page, inside)
        _score_chunk(s, q, k_form, k_table, page, inside, n, k_room)
        soften_chunk(s, n, acc, tops, sums, kv_heads, lo, hi, token, page, softcap, slopes, lo)
        for j in range(0, n, FOUR):
            last = min(n - j, FOUR) - 1
            b, c, d = at + min(1, last) * each, at + min(2, last) * each, at + last * each
            for h in range(kv_heads):
                write_rows(at, v_form, v_table, page, inside, j, j + last + 1, h, *v_room)
                add_four(acc, s, j, h * queries, (h + 1) * queries, at, b, c, d, tile)


@njit(nogil=True, error_model="numpy")
def _attend_span(
    o, lse, q, q_indptr, kv_indptr, kv_indices, lo, hi, starts, span_first, span_stop, k_form,
    k_table, v_form, v_table, list_tokens, softcap,
):  # fmt: skip
    """Attend over the tokens `[span_first, span_stop)` of all sequences laid end to end."""
    for n in range(q_indptr.shape[0] - 1):
        a, b = q_indptr[n], q_indptr[n + 1]
        clear_rows(o[a:b], lse[a:b])
        first, stop = part_of(n, q_indptr, lo, hi, starts, span_first, span_stop)
        if stop <= first:
            continue
        queries, acc, s, tops, sums = open_rows(q[a:b], o.shape[2], k_form.kv_heads)
        _attend_rows(
            queries, acc, tops, sums, s, k_form, k_table, v_form, v_table,
            kv_indices[kv_indptr[n] : kv_indptr[n + 1]], list_tokens, lo[a:b], hi[a:b], first,
            stop, softcap,
        )  # fmt: skip
        close_rows(o[a:b], lse[a:b], acc, tops, sums, k_form.kv_heads)


def attend_codes(
    q: Tensor, keys: CodeTable, values: CodeTable, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float | None = None,
    list_tokens: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with a few rows per sequence to pages of codes in host memory; see `paged_attention` for the rest.

    The result does not depend on the number of threads.

    Args:
        list_tokens: tokens of an entry of `kv_indices`: a page's, or fewer that divide it, such as 1 where single
            tokens were chosen.

    Shape: q `[rows, heads, head_dim]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]` (natural log)
    """
    rows = asked_rows(q, q_indptr, kv_indptr, kv_indices, lo, hi, scale)
    list_tokens = list_tokens or keys.form.page_tokens
    token_bytes = keys.form.kv_heads * (keys.form.code_bytes + values.form.code_bytes)
    spans = max(1, min(MOST_SPANS, rows.tokens * token_bytes // SPAN_BYTES))
    cap = float(softcap or 0.0)

    def attend(o: np.ndarray, lse: np.ndarray, first: int, stop: int) -> None:
        _attend_span(
            o, lse, *rows, first, stop, keys.form, keys.pages, values.form, values.pages,
            list_tokens, cap,
        )  # fmt: skip

    return merged_spans(attend, rows, values.form.width, spans, list_tokens, q.dtype)


@njit(nogil=True, error_model="numpy")
def _score(out, q, form, table, pages, list_tokens, first, stop):
    """Dot products of tokens `[first, stop)`. Shape: out `[queries, tokens]`"""
    page, inside = np.empty(CHUNK_TOKENS, np.int64), np.empty(CHUNK_TOKENS, np.int64)
    s, room = np.empty((q.shape[0], CHUNK_TOKENS), q.dtype), room_for(form)
    for token in range(first, stop, CHUNK_TOKENS):
        n = min(CHUNK_TOKENS, stop - token)
        _find(pages, list_tokens, form.page_tokens, token, n, page, inside)
        _score_chunk(s, q, form, table, page, inside, n, room)
        for i in range(q.shape[0]):
            out[i, token : token + n] = s[i, :n]


def score_codes(q: Tensor, keys: CodeTable, pages: Tensor, count: int) -> Tensor:
    """Give dot products with the first `count` tokens of pages of codes; as `unit_scores`.

    Shape: q `[kv_heads, queries, head_dim]` float32 or float64, pages `[n]` -> `[kv_heads, queries, count]`
    """
    out = torch.empty(*q.shape[:2], count, dtype=q.dtype)
    asked, where = plain(q.flatten(0, 1), q.dtype), plain(pages, torch.int64)
    into, size = out.flatten(0, 1).numpy(), keys.form.page_tokens

    def part(first: int, stop: int) -> None:
        _score(into, asked, keys.form, keys.pages, where, size, first, stop)

    run_rows(part, count, max(1, SPAN_BYTES // (keys.form.kv_heads * keys.form.code_bytes)))
    return out
