"""Paged decode attention on CUDA: tensor cores, split over the tokens, bfloat16 pages (GQA).

A block serves one sequence, one KV head and one split of its tokens; its four warps take tiles of 16 tokens in turn.
All query rows of the head's group (up to 16 at a time, padded) are the 16 rows of `mma`, so a page is read once.

K and V go from memory to registers in 16-byte pieces and never through shared memory. A dot product does not care for
the order of its terms: lane (g, c) reads 8 neighbouring dims of token g, and the queries are read in the same order.
Of V, a lane reads 8 neighbouring dims of the 4 tokens whose weights it holds; two tokens' halves are paired by `prmt`.

Source: FlashDecoding; FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.page_forms import PageForm, reader, row_bytes, scale_bytes, whole_scale
from .gpu.ptx import device_function, f32, i32, u32, u64
from .merge import LN2, LOG2E

ROWS, TILE, WARPS = 16, 16, 4
NOTHING = f32(-1.0e30)  # a score that is masked: finite, so that differences are numbers
LOWS, HIGHS = u32(0x5410), u32(0x7632)
PLAIN = PageForm()


def _table() -> list[dict[str, Any]]:
    usual: dict[str, Any] = {"kv_heads": 8, "page_tokens": 16, "capped": False}
    coded = [
        PageForm("e4m3"),
        PageForm("int8"),
        PageForm("int4", 32),
        PageForm("mxfp8", 32),
        PageForm("mxfp4", 32),
    ]
    return [
        {**usual, "group": 8, "head_dim": 64, "page_tokens": 64, "capped": True},
        {**usual, "group": 4, "head_dim": 128},
        *({**usual, "group": 4, "head_dim": 128, "k_form": form, "v_form": form} for form in coded),
        {**usual, "group": 7, "head_dim": 64, "k_form": PageForm("int8"), "v_form": PageForm("int4", 16, 1 << 14)},
    ]  # fmt: skip


@device_function
def span_of(lo, hi, first_row, count, split, split_shift):
    """A split's tokens, whole tiles of what any row of the sequence sees: the first, and the one after the last."""
    low, high, r = i32(0x7FFFFFFF), i32(0), i32(0)
    while r < count:
        at = u64(u32(i32(first_row + r))) * u64(4)
        if i32(ptx.ld4(hi + at)) > i32(ptx.ld4(lo + at)):
            low, high = min(low, i32(ptx.ld4(lo + at))), max(high, i32(ptx.ld4(hi + at)))
        r = i32(r + i32(1))
    length = i32(max(i32(high - low), i32(0)) + (i32(1) << split_shift) - i32(1)) >> split_shift
    length = i32(i32(length + i32(TILE - 1)) & i32(-TILE))
    begin = i32(low + split * length)
    return begin, min(high, i32(begin + length))


def softmax_step(sets: int) -> Any:
    """Give the online softmax of a tile for one of a lane's two rows, with 64 * `sets` dims of output."""

    @device_function
    def weights_of(s, half, largest, top, total, acc):
        """Make weights of scores, and what came before smaller if the largest score grew."""
        largest = max(largest, ptx.shuffle_xor(largest, i32(1)))
        largest = max(largest, ptx.shuffle_xor(largest, i32(2)))
        keep = ptx.exp2(f32(top[half] - largest))
        top[half], total[half] = largest, f32(total[half] * keep)
        for i in range(8 * sets):
            acc[4 * i + 2 * half] *= keep
            acc[4 * i + 2 * half + 1] *= keep
        for i in range(4):
            j = 4 * (i // 2) + 2 * half + i % 2
            seen = s[j] != NOTHING
            s[j] = ptx.exp2(f32(s[j] - largest)) if seen else f32(0)
            total[half] += s[j]

    return weights_of


@kernel(threads=32 * WARPS, table=_table())
def decode_pages(
    group, kv_heads, head_dim, page_tokens, capped, threads, k_form=PLAIN, v_form=PLAIN
):
    """Attend to one split; o in float32 and lse of each split, for `merge_states`."""
    heads, page_shift = group * kv_heads, page_tokens.bit_length() - 1
    chunks, sets = head_dim // 32, head_dim // 64
    q_words, k_words, outs = 8 * chunks, 4 * chunks, 32 * sets
    spread, edges, quarter = ROWS * head_dim, ROWS * WARPS, head_dim // 4
    quarter_shift, token_mask = quarter.bit_length() - 1, page_tokens - 1
    k_of, v_of = reader(k_form, chunks), reader(v_form, sets)
    load_k, scales_k, widen_k, k_each = k_of.load, k_of.scales, k_of.widen, k_of.pieces
    load_v, scales_v, widen_v, v_each = v_of.load, v_of.scales, v_of.widen, v_of.pieces
    k_loads, v_loads = chunks // k_each, sets // v_each
    k_row, v_row = row_bytes(k_form, head_dim), row_bytes(v_form, head_dim)
    k_scale, v_scale = scale_bytes(k_form, head_dim), scale_bytes(v_form, head_dim)
    k_whole, v_whole = whole_scale(k_form), whole_scale(v_form)
    k_bytes, v_bytes = k_row // k_loads // 4, v_row // v_loads // 8  # of a lane's load
    k_block, v_block = ((form.block or head_dim).bit_length() - 1 for form in (k_form, v_form))
    vectors = page_tokens * kv_heads
    k_page, v_page, ks_page, vs_page = (
        form.page_bytes or vectors * each
        for form, each in ((k_form, k_row), (v_form, v_row), (k_form, k_scale), (v_form, v_scale))
    )
    second = v_each - 1  # the piece of the second 64 dims
    inverse = (1 << 32) // group + 1  # group 1 is not divided by
    weights_of = softmax_step(sets)

    @device_function
    def query_of(row):
        return row if group == 1 else i32(ptx.mul_high(u32(row), u32(inverse)))

    @device_function
    def slot_of(t, stop, pages, head):
        """The page of a token, and the vector's number in it."""
        t = min(t, i32(stop - i32(1)))
        page = u64(ptx.ld4(pages + u64(u32(t >> i32(page_shift))) * u64(4)))
        return page, u64(u32(i32(i32((t & i32(token_mask)) * i32(kv_heads)) + head)))

    @device_function
    def fetch_values(v, v_scales, v_lows, pages, near, stop, head, g, m, words, by, low):
        """Load some dims of the four tokens whose weights a lane holds, with their scales."""
        for i in range(4):
            t = i32(near + i32(8 * (i // 2) + i % 2))
            page, vector = slot_of(t, stop, pages, head)
            at = v + page * u64(v_page) + vector * u64(v_row) + u64(8 * v_bytes * m)
            w, x, y, z = load_v(at + u64(u32(g)) * u64(v_bytes))
            words[4 * i], words[4 * i + 1] = w, x
            words[4 * i + 2], words[4 * i + 3] = y, z
            at = page * u64(vs_page) + vector * u64(v_scale)
            dim = u32(u32(m * 64 * v_each) + u32(g) * u32(8 * v_each))
            by[i], low[i] = scales_v(v_scales + at, v_lows + at, u64(dim >> u32(v_block)))

    @device_function
    def weigh(words, by, low, values, p0, p1, p2, p3, m, p, acc):
        """Add 64 dims of the tokens, weighted: piece p of what was loaded."""
        widen_v(words, 0, p, by[0], low[0], values, 0)
        widen_v(words, 4, p, by[1], low[1], values, 4)
        widen_v(words, 8, p, by[2], low[2], values, 8)
        widen_v(words, 12, p, by[3], low[3], values, 12)
        for j in range(8):
            halves = HIGHS if j % 2 else LOWS
            b0 = ptx.pick_bytes(values[j // 2], values[4 + j // 2], halves)
            b1 = ptx.pick_bytes(values[8 + j // 2], values[12 + j // 2], halves)
            at4 = 32 * m + 4 * j
            d0, d1, d2, d3 = ptx.mma_bf16(
                p0, p1, p2, p3, b0, b1, acc[at4], acc[at4 + 1], acc[at4 + 2], acc[at4 + 3]
            )
            acc[at4], acc[at4 + 1], acc[at4 + 2], acc[at4 + 3] = d0, d1, d2, d3

    @device_function
    def gather(acc, merged, g, c, turn, m):
        """Add 64 dims of what a warp has to what the warps before it had."""
        for i in range(32):
            j, half, odd = i // 4, i % 4 // 2, i % 2
            dim = m // v_each * 64 * v_each + m % v_each * 8 + j + 8 * v_each * odd
            column = i32(i32(dim) + c * i32(16 * v_each))
            place = u32(i32((g + i32(8 * half)) * i32(head_dim) + column))
            before = f32(0) if turn == i32(0) else merged[place]
            merged[place] = f32(before + acc[32 * m + i])

    def body(
        q: u64, k: u64, v: u64, q_indptr: u64, kv_indptr: u64, kv_indices: u64, lo: u64, hi: u64,
        o: u64, lse: u64, rows: i32, split_shift: i32, scale: f32, cap: f32,
        k_scales: u64, k_lows: u64, v_scales: u64, v_lows: u64,
    ):  # fmt: skip
        sums_of, tops_of = ptx.shared(edges, f32), ptx.shared(edges, f32)
        merged = ptx.shared(spread, f32)
        lane, warp = i32(ptx.thread() & i32(31)), i32(ptx.thread() >> i32(5))
        g, c = i32(lane >> i32(2)), i32(lane & i32(3))
        head, split, sequence = ptx.block(), ptx.block_y(), u64(u32(ptx.block_z()))
        first_row = i32(ptx.ld4(q_indptr + sequence * u64(4)))
        count = i32(i32(ptx.ld4(q_indptr + sequence * u64(4) + u64(4))) - first_row)
        pages = kv_indices + u64(ptx.ld4(kv_indptr + sequence * u64(4))) * u64(4)
        begin, stop = span_of(lo, hi, first_row, count, split, split_shift)
        done, whole_rows = i32(0), i32(count * i32(group))
        while done < whole_rows:
            a = ptx.local(q_words, u32)
            row, last, first = ptx.local(2, i32), ptx.local(2, i32), ptx.local(2, i32)
            for half in range(2):
                row[half] = i32(done + g + i32(8 * half))
                inside = row[half] < whole_rows
                asked = query_of(row[half]) if inside else i32(0)
                place = i32(row[half] - i32(asked * i32(group))) if inside else i32(0)
                query = i32(first_row + asked)
                first[half] = i32(ptx.ld4(lo + u64(u32(query)) * u64(4))) if inside else i32(0)
                last[half] = i32(ptx.ld4(hi + u64(u32(query)) * u64(4))) if inside else i32(0)
                place = i32(i32(head * i32(group)) + place)
                q_at = (u64(u32(query)) * u64(heads) + u64(u32(place))) * u64(2 * head_dim)
                q_at += u64(u32(c)) * u64(16 * k_each)
                for n in range(chunks):
                    dim = n // k_each * 32 * k_each + n % k_each * 8  # as a lane reads K
                    w, x, y, z = ptx.ld16_once(q + q_at + u64(2 * dim))
                    a[8 * n + half], a[8 * n + 2 + half] = w, x
                    a[8 * n + 4 + half], a[8 * n + 6 + half] = y, z
            acc, top, total = ptx.local(outs, f32), ptx.local(2, f32), ptx.local(2, f32)
            for i in range(outs):
                acc[i] = f32(0)
            for half in range(2):
                top[half], total[half] = NOTHING, f32(0)
            token = i32(begin + warp * i32(TILE))
            while token < stop:
                s, b, raw = ptx.local(8, f32), ptx.local(k_words, u32), ptx.local(4, u32)
                for tile in range(2):
                    page, vector = slot_of(i32(token + g + i32(8 * tile)), stop, pages, head)
                    at = k + page * u64(k_page) + vector * u64(k_row)
                    at += u64(u32(c)) * u64(k_bytes)
                    scales_at = page * u64(ks_page) + vector * u64(k_scale)
                    for n in range(k_loads):
                        raw[0], raw[1], raw[2], raw[3] = load_k(at + u64(4 * k_bytes * n))
                        dim = u32(u32(n * 32 * k_each) + u32(c) * u32(8 * k_each))
                        by, low_end = scales_k(
                            k_scales + scales_at, k_lows + scales_at, u64(dim >> u32(k_block))
                        )
                        for p in range(k_each):
                            widen_k(raw, 0, p, by, low_end, b, 4 * (n * k_each + p))
                    d0, d1, d2, d3 = f32(0), f32(0), f32(0), f32(0)
                    for n in range(2 * chunks):
                        d0, d1, d2, d3 = ptx.mma_bf16(
                            a[4 * n], a[4 * n + 1], a[4 * n + 2], a[4 * n + 3],
                            b[2 * n], b[2 * n + 1], d0, d1, d2, d3,
                        )  # fmt: skip
                    s[4 * tile], s[4 * tile + 1] = d0, d1
                    s[4 * tile + 2], s[4 * tile + 3] = d2, d3
                k_by, v_by = ptx.local(4, f32), ptx.local(4, f32)
                for i in range(4):
                    if k_whole or v_whole:
                        t = i32(token + c * i32(2) + i32(8 * (i // 2) + i % 2))
                        page, vector = slot_of(t, stop, pages, head)
                        if k_whole:
                            k_by[i] = ptx.ld_f32(k_scales + page * u64(ks_page) + vector * u64(4))
                        if v_whole:
                            v_by[i] = ptx.ld_f32(v_scales + page * u64(vs_page) + vector * u64(4))
                for half in range(2):
                    largest = top[half]
                    for i in range(4):
                        j = 4 * (i // 2) + 2 * half + i % 2
                        t = i32(token + c * i32(2) + i32(8 * (i // 2) + i % 2))
                        score = f32(s[j] * scale)
                        if k_whole:
                            score = f32(score * k_by[i])
                        if capped:
                            score = f32(cap * ptx.tanh(f32(score * ptx.reciprocal(cap))))
                        score = f32(score * LOG2E)
                        s[j] = score if t >= first[half] and t < min(last[half], stop) else NOTHING
                        largest = s[j] if s[j] > largest or s[j] != s[j] else largest
                    weights_of(s, half, largest, top, total, acc)
                    for i in range(4):
                        if v_whole:
                            j = 4 * (i // 2) + 2 * half + i % 2
                            s[j] = f32(s[j] * v_by[i])
                p0, p1 = ptx.bf16x2(s[0], s[1]), ptx.bf16x2(s[2], s[3])
                p2, p3 = ptx.bf16x2(s[4], s[5]), ptx.bf16x2(s[6], s[7])
                values, words = ptx.local(16, u32), ptx.local(16, u32)
                v_by_pair, v_low = ptx.local(4, u32), ptx.local(4, u32)
                near = i32(token + c * i32(2))
                fetch_values(
                    v, v_scales, v_lows, pages, near, stop, head, g, 0, words, v_by_pair, v_low
                )
                weigh(words, v_by_pair, v_low, values, p0, p1, p2, p3, 0, 0, acc)
                if (
                    sets > 1
                ):  # written out: an unrolled loop is left to the compiler, and sm_100's does not
                    if v_loads > 1:
                        fetch_values(
                            v,
                            v_scales,
                            v_lows,
                            pages,
                            near,
                            stop,
                            head,
                            g,
                            1,
                            words,
                            v_by_pair,
                            v_low,
                        )
                    weigh(words, v_by_pair, v_low, values, p0, p1, p2, p3, 1, second, acc)
                token = i32(token + i32(TILE * WARPS))
            for half in range(2):
                total[half] += ptx.shuffle_xor(total[half], i32(1))
                total[half] += ptx.shuffle_xor(total[half], i32(2))
                if c == i32(0):
                    mine = u32(i32(warp * i32(ROWS) + g + i32(8 * half)))
                    tops_of[mine], sums_of[mine] = top[half], total[half]
            ptx.barrier()
            for half in range(2):
                highest = NOTHING
                for w in range(WARPS):
                    other = tops_of[u32(i32(g + i32(8 * half + ROWS * w)))]
                    highest = other if other > highest or other != other else highest
                keep = ptx.exp2(f32(top[half] - highest))
                for i in range(8 * sets):
                    acc[4 * i + 2 * half] *= keep
                    acc[4 * i + 2 * half + 1] *= keep
            turn = i32(0)
            while turn < i32(WARPS):
                if warp == turn:
                    gather(acc, merged, g, c, turn, 0)
                    if sets > 1:
                        gather(acc, merged, g, c, turn, 1)
                turn = i32(turn + i32(1))
                ptx.barrier()
            i = ptx.thread()
            while i < i32(ROWS * quarter):
                one = i32(i >> i32(quarter_shift))
                if i32(done + one) < whole_rows:
                    highest, whole = NOTHING, f32(0)
                    for w in range(WARPS):
                        other = tops_of[u32(i32(one + i32(ROWS * w)))]
                        highest = other if other > highest or other != other else highest
                    for w in range(WARPS):
                        mine = u32(i32(one + i32(ROWS * w)))
                        whole += f32(sums_of[mine] * ptx.exp2(f32(tops_of[mine] - highest)))
                    by = f32(0) if whole == f32(0) else ptx.reciprocal(whole)
                    at = u32(i32(i * i32(4)))
                    asked = query_of(i32(done + one))
                    place = i32(i32(done + one) - i32(asked * i32(group)))
                    place = i32(i32(head * i32(group)) + place)
                    query = i32(first_row + asked)
                    target = u64(u32(i32(split * rows + query))) * u64(heads) + u64(u32(place))
                    within = u64(u32(i & i32(quarter - 1))) * u64(16)
                    ptx.st16(
                        o + target * u64(4 * head_dim) + within,
                        ptx.as_u32(f32(merged[at] * by)),
                        ptx.as_u32(f32(merged[at + u32(1)] * by)),
                        ptx.as_u32(f32(merged[at + u32(2)] * by)),
                        ptx.as_u32(f32(merged[at + u32(3)] * by)),
                    )
                    if (i & i32(quarter - 1)) == i32(0):
                        gone = whole == f32(0)
                        told = f32(f32(highest + ptx.log2(whole)) * LN2)
                        ptx.st_f32(lse + target * u64(4), f32(-np.inf) if gone else told)
                i = i32(i + i32(threads))
            ptx.barrier()
            done = i32(done + i32(ROWS))

    return body


def decode_launch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, integers: list[Tensor], scale: float,
    softcap: float, splits: int, shape: tuple[int, int] | None = None,
    forms: tuple[PageForm, PageForm] = (PLAIN, PLAIN), scales: tuple[int, ...] = (0, 0, 0, 0),
) -> tuple[Variant, tuple[int, int, int], tuple[float, ...], Tensor, Tensor]:  # fmt: skip
    """Choose variant, grid and arguments, and make the outputs of the splits.

    Shape: integers q_indptr, kv_indptr, kv_indices, lo, hi, all int32
        -> o `[splits, rows, heads, head_dim]` float32, lse `[splits, rows, heads]`

    Args:
        shape: tokens of a page and KV heads, where pages are codes.
        scales: addresses of K's scales and low ends, and of V's.
    """
    rows, heads, head_dim = q.shape
    page_tokens, kv_heads = shape or (k_pages.shape[1], k_pages.shape[2])
    constants: dict[str, Any] = {} if shape is None else {"k_form": forms[0], "v_form": forms[1]}
    variant = decode_pages(
        group=heads // kv_heads, kv_heads=kv_heads, head_dim=head_dim, page_tokens=page_tokens,
        capped=softcap > 0, **constants,
    )  # fmt: skip
    o = q.new_empty(splits, rows, heads, head_dim, dtype=torch.float32)
    lse = q.new_empty(splits, rows, heads, dtype=torch.float32)
    grid = (kv_heads, splits, integers[0].numel() - 1)
    pointers = (t.data_ptr() for t in (q, k_pages, v_pages, *integers, o, lse))
    given = (*pointers, rows, splits.bit_length() - 1, scale, softcap, *scales)
    return variant, grid, given, o, lse


__all__ = ["PLAIN", "ROWS", "decode_launch", "decode_pages"]
