"""Paged decode attention of MLA on CUDA: one latent vector a token for all heads, V its first dims; tensor cores.

A block serves 16 query rows of one sequence and one split of its tokens. A latent is too wide for one warp's registers,
so four warps share each tile of 16 tokens: every warp multiplies its part of the dims, the parts of the scores meet in
shared memory, all warps take the same softmax, and each keeps its own dims of the output. The tile's V is what was
read as K a moment ago: it comes out of L1.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.2, absorbed form; FlashAttention-2 for the online softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.ptx import device_function, f32, i32, u32, u64
from .merge import LN2, LOG2E
from .paged_decode import HIGHS, LOWS, NOTHING, ROWS, TILE, WARPS, softmax_step, span_of


@kernel(
    threads=32 * WARPS,
    table=[{"heads": 16, "head_dim": 576, "value_dim": 512, "page_tokens": 64, "capped": False}],
)
def decode_latents(heads, head_dim, value_dim, page_tokens, capped, threads):
    """Attend to one split; o in float32 and lse of each split, for `merge_states`."""
    page_shift, token_mask = page_tokens.bit_length() - 1, page_tokens - 1
    chunks, sets = head_dim // 32, value_dim // (64 * WARPS)
    each = -(-chunks // WARPS)  # chunks of 32 dims of a warp: w, w + 4, ...
    q_words, outs, cells = 8 * each, 32 * sets, ROWS * TILE * WARPS
    token_bytes = head_dim * 2
    inverse, weights_of = (1 << 32) // heads + 1, softmax_step(sets)

    @device_function
    def query_of(row):
        return row if heads == 1 else i32(ptx.mul_high(u32(row), u32(inverse)))

    @device_function
    def place_of(t, stop, pages):
        t = min(t, i32(stop - i32(1)))
        page = u64(ptx.ld4(pages + u64(u32(t >> i32(page_shift))) * u64(4)))
        return (page * u64(page_tokens) + u64(u32(t & i32(token_mask)))) * u64(token_bytes)

    @device_function
    def weigh(k, t0, t1, t2, t3, g, warp, m, p0, p1, p2, p3, values, acc):
        """Add 64 dims of four tokens, weighted."""
        at = k + u64(128 * m) + u64(u32(warp)) * u64(128 * sets) + u64(u32(g)) * u64(16)
        values[0], values[1], values[2], values[3] = ptx.ld16(at + t0)
        values[4], values[5], values[6], values[7] = ptx.ld16(at + t1)
        values[8], values[9], values[10], values[11] = ptx.ld16(at + t2)
        values[12], values[13], values[14], values[15] = ptx.ld16(at + t3)
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
    def write(acc, m, half, target, by, warp, c):
        """Write a lane's share of 64 dims of a row."""
        for j in range(0, 8, 4):
            for odd in range(2):
                dim = u64(4 * (64 * m + j + 8 * odd)) + u64(u32(warp)) * u64(256 * sets)
                ptx.st16(
                    target + dim + u64(u32(c)) * u64(64),
                    ptx.as_u32(f32(acc[32 * m + 4 * j + 2 * half + odd] * by)),
                    ptx.as_u32(f32(acc[32 * m + 4 * (j + 1) + 2 * half + odd] * by)),
                    ptx.as_u32(f32(acc[32 * m + 4 * (j + 2) + 2 * half + odd] * by)),
                    ptx.as_u32(f32(acc[32 * m + 4 * (j + 3) + 2 * half + odd] * by)),
                )

    def body(
        q: u64, k: u64, q_indptr: u64, kv_indptr: u64, kv_indices: u64, lo: u64, hi: u64,
        o: u64, lse: u64, rows: i32, split_shift: i32, scale: f32, cap: f32,
    ):  # fmt: skip
        parts = ptx.shared(cells, f32)  # [warp, row, token] of the scores
        lane, warp = i32(ptx.thread() & i32(31)), i32(ptx.thread() >> i32(5))
        g, c = i32(lane >> i32(2)), i32(lane & i32(3))
        split, sequence = ptx.block_y(), u64(u32(ptx.block_z()))
        first_row = i32(ptx.ld4(q_indptr + sequence * u64(4)))
        count = i32(i32(ptx.ld4(q_indptr + sequence * u64(4) + u64(4))) - first_row)
        pages = kv_indices + u64(ptx.ld4(kv_indptr + sequence * u64(4))) * u64(4)
        begin, stop = span_of(lo, hi, first_row, count, split, split_shift)
        done, whole_rows = i32(ptx.block() * i32(ROWS)), i32(count * i32(heads))
        while done < whole_rows:  # blocks of x share out the rows
            a = ptx.local(q_words, u32)
            first, last, target = ptx.local(2, i32), ptx.local(2, i32), ptx.local(2, u64)
            for half in range(2):
                row = i32(done + g + i32(8 * half))
                inside = row < whole_rows
                asked = query_of(row) if inside else i32(0)
                place = i32(row - i32(asked * i32(heads))) if inside else i32(0)
                query = i32(first_row + asked)
                first[half] = i32(ptx.ld4(lo + u64(u32(query)) * u64(4))) if inside else i32(0)
                last[half] = i32(ptx.ld4(hi + u64(u32(query)) * u64(4))) if inside else i32(0)
                q_at = (u64(u32(query)) * u64(heads) + u64(u32(place))) * u64(token_bytes)
                target[half] = u64(u32(i32(split * rows + query))) * u64(heads) + u64(u32(place))
                for n in range(each):
                    chunk = i32(warp + i32(WARPS * n))
                    chunk = min(chunk, i32(chunks - 1))
                    w, x, y, z = ptx.ld16_once(
                        q + q_at + u64(u32(chunk)) * u64(64) + u64(u32(c)) * u64(16)
                    )
                    a[8 * n + half], a[8 * n + 2 + half] = w, x
                    a[8 * n + 4 + half], a[8 * n + 6 + half] = y, z
            acc, top, total = ptx.local(outs, f32), ptx.local(2, f32), ptx.local(2, f32)
            for i in range(outs):
                acc[i] = f32(0)
            for half in range(2):
                top[half], total[half] = NOTHING, f32(0)
            token = begin
            while token < stop:
                for tile in range(2):
                    at = k + place_of(i32(token + g + i32(8 * tile)), stop, pages)
                    d0, d1, d2, d3 = f32(0), f32(0), f32(0), f32(0)
                    for n in range(each):
                        chunk = i32(warp + i32(WARPS * n))
                        if chunk < i32(chunks):  # the same for all of a warp
                            w, x, y, z = ptx.ld16(
                                at + u64(u32(chunk)) * u64(64) + u64(u32(c)) * u64(16)
                            )
                            d0, d1, d2, d3 = ptx.mma_bf16(
                                a[8 * n], a[8 * n + 1], a[8 * n + 2], a[8 * n + 3], w, x,
                                d0, d1, d2, d3,
                            )  # fmt: skip
                            d0, d1, d2, d3 = ptx.mma_bf16(
                                a[8 * n + 4], a[8 * n + 5], a[8 * n + 6], a[8 * n + 7], y, z,
                                d0, d1, d2, d3,
                            )  # fmt: skip
                    cell = u32(i32(warp * i32(ROWS * TILE) + g * i32(TILE) + c * i32(2)))
                    cell = u32(cell + u32(8 * tile))
                    parts[cell], parts[cell + u32(1)] = d0, d1
                    parts[cell + u32(8 * TILE)], parts[cell + u32(8 * TILE + 1)] = d2, d3
                ptx.barrier()  # all parts are there
                s = ptx.local(8, f32)
                for half in range(2):
                    largest = top[half]
                    for i in range(4):
                        j = 4 * (i // 2) + 2 * half + i % 2
                        column = i32(c * i32(2) + i32(8 * (i // 2) + i % 2))
                        cell = u32(i32((g + i32(8 * half)) * i32(TILE) + column))
                        score = f32(0)
                        for w in range(WARPS):
                            score += parts[u32(cell + u32(w * ROWS * TILE))]
                        score = f32(score * scale)
                        if capped:
                            score = f32(cap * ptx.tanh(f32(score * ptx.reciprocal(cap))))
                        score = f32(score * LOG2E)
                        t = i32(token + column)
                        s[j] = score if t >= first[half] and t < min(last[half], stop) else NOTHING
                        largest = s[j] if s[j] > largest or s[j] != s[j] else largest
                    weights_of(s, half, largest, top, total, acc)
                p0, p1 = ptx.bf16x2(s[0], s[1]), ptx.bf16x2(s[2], s[3])
                p2, p3 = ptx.bf16x2(s[4], s[5]), ptx.bf16x2(s[6], s[7])
                near = i32(token + c * i32(2))
                t0, t1 = place_of(near, stop, pages), place_of(i32(near + i32(1)), stop, pages)
                t2 = place_of(i32(near + i32(8)), stop, pages)
                t3 = place_of(i32(near + i32(9)), stop, pages)
                values = ptx.local(16, u32)
                weigh(k, t0, t1, t2, t3, g, warp, 0, p0, p1, p2, p3, values, acc)
                if sets > 1:
                    weigh(k, t0, t1, t2, t3, g, warp, 1, p0, p1, p2, p3, values, acc)
                ptx.barrier()  # all have read the scores
                token = i32(token + i32(TILE))
            for half in range(2):
                total[half] += ptx.shuffle_xor(total[half], i32(1))
                total[half] += ptx.shuffle_xor(total[half], i32(2))
                if i32(done + g + i32(8 * half)) < whole_rows:
                    gone = total[half] == f32(0)
                    by = f32(0) if gone else ptx.reciprocal(total[half])
                    to = o + target[half] * u64(4 * value_dim)
                    write(acc, 0, half, to, by, warp, c)
                    if sets > 1:
                        write(acc, 1, half, to, by, warp, c)
                    if ptx.thread() < i32(32) and c == i32(0):
                        told = f32(f32(top[half] + ptx.log2(total[half])) * LN2)
                        ptx.st_f32(lse + target[half] * u64(4), f32(-np.inf) if gone else told)
            done = i32(done + ptx.blocks() * i32(ROWS))

    return body


def served_latent(q: Tensor, k_pages: Tensor, v_pages: Tensor, value_dim: int) -> bool:
    """Say whether the kernel serves a call: one KV head, V the first dims of the same bfloat16 pages."""
    page_tokens, kv_heads, head_dim = k_pages.shape[1:]
    return (
        all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (q, k_pages))
        and q.data_ptr() % 16 == 0
        and k_pages.data_ptr() % 16 == 0
        and v_pages.data_ptr() == k_pages.data_ptr()
        and v_pages.stride() == k_pages.stride()
        and kv_heads == 1
        and value_dim in (256, 512)
        and head_dim % 32 == 0
        and value_dim <= head_dim <= 640
        and page_tokens & (page_tokens - 1) == 0
        and q.numel() > 0
    )


def latent_launch(
    q: Tensor, k_pages: Tensor, value_dim: int, integers: list[Tensor], scale: float,
    softcap: float, splits: int,
) -> tuple[Variant, tuple[int, int, int], tuple[float, ...], Tensor, Tensor]:  # fmt: skip
    """Choose variant, grid and arguments, and make the outputs of the splits; see `decode_launch`."""
    rows, heads, head_dim = q.shape
    constants: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim}
    variant = decode_latents(**constants, page_tokens=k_pages.shape[1], capped=softcap > 0)
    o = q.new_empty(splits, rows, heads, value_dim, dtype=torch.float32)
    lse = q.new_empty(splits, rows, heads, dtype=torch.float32)
    sequences = integers[0].numel() - 1
    most = -(-rows * heads // (ROWS * sequences))  # as if all sequences had as many rows
    pointers = (t.data_ptr() for t in (q, k_pages, *integers, o, lse))
    given = (*pointers, rows, splits.bit_length() - 1, scale, softcap)
    return variant, (max(1, most), splits, sequences), given, o, lse


__all__ = ["decode_latents", "latent_launch", "served_latent"]
