"""Paged decode attention on CUDA: tensor cores, split over the tokens, bfloat16 pages (GQA).

A block serves one sequence, one KV head and one split of its tokens; its four warps take tiles of 16 tokens in turn.
All query rows of the head's group (up to 16 at a time, padded) are the 16 rows of `mma`, so a page is read once.

K and V go from memory to registers in 16-byte pieces and never through shared memory. A dot product does not care for
the order of its terms: lane (g, c) reads 8 neighbouring dims of token g, and the queries are read in the same order.
Of V, a lane reads 8 neighbouring dims of the 4 tokens whose weights it holds; two tokens' halves are paired by `prmt`.

Source: FlashDecoding; FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel
from .gpu.ptx import f32, i32, u32, u64
from .gpu.toolchain import usable
from .merge import LN2, LOG2E, merge_states
from .paged_attention import paged_attention_op, paged_attention_reference
from .scores import Interleave

ROWS, TILE, WARPS = 16, 16, 4
NOTHING = f32(-1.0e30)  # a score that is masked: finite, so that differences are numbers
LOWS, HIGHS = u32(0x5410), u32(0x7632)


# ptxas spills a few registers for sm_100: not in the table
@kernel(
    threads=32 * WARPS,
    table=[
        {
            "group": 8,
            "kv_heads": 8,
            "head_dim": 64,
            "page_tokens": 64,
            "capped": True,
            "newest": 90,
        },
        {"group": 4, "kv_heads": 8, "head_dim": 128, "page_tokens": 16, "capped": False},
    ],
)
def decode_pages(group, kv_heads, head_dim, page_tokens, capped, threads):
    """Attend to one split; o in float32 and lse of each split, for `merge_states`."""
    heads, page_shift, group_shift = (
        group * kv_heads,
        page_tokens.bit_length() - 1,
        group.bit_length() - 1,
    )
    chunks, sets = head_dim // 32, head_dim // 64
    q_words, k_words, outs = 8 * chunks, 4 * chunks, 32 * sets
    token_bytes, page_bytes = kv_heads * head_dim * 2, page_tokens * kv_heads * head_dim * 2
    spread, edges, quarter = ROWS * head_dim, ROWS * WARPS, head_dim // 4
    quarter_shift, token_mask = quarter.bit_length() - 1, page_tokens - 1

    def body(
        q: u64, k: u64, v: u64, q_indptr: u64, kv_indptr: u64, kv_indices: u64, lo: u64, hi: u64,
        o: u64, lse: u64, rows: i32, split_shift: i32, scale: f32, cap: f32,
    ):  # fmt: skip
        sums_of, tops_of = ptx.shared(edges, f32), ptx.shared(edges, f32)
        merged = ptx.shared(spread, f32)
        lane, warp = i32(ptx.thread() & i32(31)), i32(ptx.thread() >> i32(5))
        g, c = i32(lane >> i32(2)), i32(lane & i32(3))
        head, split, sequence = ptx.block(), ptx.block_y(), u64(u32(ptx.block_z()))
        first_row = i32(ptx.ld4(q_indptr + sequence * u64(4)))
        count = i32(i32(ptx.ld4(q_indptr + sequence * u64(4) + u64(4))) - first_row)
        pages = kv_indices + u64(ptx.ld4(kv_indptr + sequence * u64(4))) * u64(4)
        low, high = i32(0x7FFFFFFF), i32(0)
        r = i32(0)
        while r < count:  # the tokens that any row sees
            at = u64(u32(i32(first_row + r))) * u64(4)
            if i32(ptx.ld4(hi + at)) > i32(ptx.ld4(lo + at)):
                low, high = min(low, i32(ptx.ld4(lo + at))), max(high, i32(ptx.ld4(hi + at)))
            r = i32(r + i32(1))
        length = i32(max(i32(high - low), i32(0)) + (i32(1) << split_shift) - i32(1)) >> split_shift
        length = i32(i32(length + i32(TILE - 1)) & i32(-TILE))
        begin = i32(low + split * length)
        stop = min(high, i32(begin + length))
        kv_offset = u64(u32(head)) * u64(2 * head_dim)
        done = i32(0)
        while done < i32(count << i32(group_shift)):
            a = ptx.local(q_words, u32)
            row, last, first = ptx.local(2, i32), ptx.local(2, i32), ptx.local(2, i32)
            for half in range(2):
                row[half] = i32(done + g + i32(8 * half))
                inside = row[half] < i32(count << i32(group_shift))
                query = i32(first_row + (row[half] >> i32(group_shift))) if inside else first_row
                first[half] = i32(ptx.ld4(lo + u64(u32(query)) * u64(4))) if inside else i32(0)
                last[half] = i32(ptx.ld4(hi + u64(u32(query)) * u64(4))) if inside else i32(0)
                place = i32(head * i32(group) + (row[half] & i32(group - 1)))
                q_at = (u64(u32(query)) * u64(heads) + u64(u32(place))) * u64(2 * head_dim)
                for n in range(chunks):
                    w, x, y, z = ptx.ld16_once(q + q_at + u64(64 * n) + u64(u32(c)) * u64(16))
                    a[8 * n + half], a[8 * n + 2 + half] = w, x
                    a[8 * n + 4 + half], a[8 * n + 6 + half] = y, z
            acc, top, total = ptx.local(outs, f32), ptx.local(2, f32), ptx.local(2, f32)
            for i in range(outs):
                acc[i] = f32(0)
            for half in range(2):
                top[half], total[half] = NOTHING, f32(0)
            token = i32(begin + warp * i32(TILE))
            while token < stop:
                s, b = ptx.local(8, f32), ptx.local(k_words, u32)
                for tile in range(2):
                    t = min(i32(token + g + i32(8 * tile)), i32(stop - i32(1)))
                    page = u64(ptx.ld4(pages + u64(u32(t >> i32(page_shift))) * u64(4)))
                    at = k + page * u64(page_bytes) + kv_offset + u64(u32(c)) * u64(16)
                    at += u64(u32(t & i32(token_mask))) * u64(token_bytes)
                    for n in range(chunks):
                        w, x, y, z = ptx.ld16_once(at + u64(64 * n))
                        b[4 * n], b[4 * n + 1], b[4 * n + 2], b[4 * n + 3] = w, x, y, z
                    d0, d1, d2, d3 = f32(0), f32(0), f32(0), f32(0)
                    for n in range(2 * chunks):
                        d0, d1, d2, d3 = ptx.mma_bf16(
                            a[4 * n], a[4 * n + 1], a[4 * n + 2], a[4 * n + 3],
                            b[2 * n], b[2 * n + 1], d0, d1, d2, d3,
                        )  # fmt: skip
                    s[4 * tile], s[4 * tile + 1] = d0, d1
                    s[4 * tile + 2], s[4 * tile + 3] = d2, d3
                for half in range(2):
                    largest = top[half]
                    for i in range(4):
                        j = 4 * (i // 2) + 2 * half + i % 2
                        t = i32(token + c * i32(2) + i32(8 * (i // 2) + i % 2))
                        score = f32(s[j] * scale)
                        if capped:
                            score = f32(cap * ptx.tanh(f32(score * ptx.reciprocal(cap))))
                        score = f32(score * LOG2E)
                        s[j] = score if t >= first[half] and t < min(last[half], stop) else NOTHING
                        largest = s[j] if s[j] > largest or s[j] != s[j] else largest
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
                p0, p1 = ptx.bf16x2(s[0], s[1]), ptx.bf16x2(s[2], s[3])
                p2, p3 = ptx.bf16x2(s[4], s[5]), ptx.bf16x2(s[6], s[7])
                values = ptx.local(16, u32)
                for m in range(sets):
                    for i in range(4):
                        t = i32(token + c * i32(2) + i32(8 * (i // 2) + i % 2))
                        t = min(t, i32(stop - i32(1)))
                        page = u64(ptx.ld4(pages + u64(u32(t >> i32(page_shift))) * u64(4)))
                        at = v + page * u64(page_bytes) + kv_offset + u64(128 * m)
                        at += u64(u32(t & i32(token_mask))) * u64(token_bytes)
                        w, x, y, z = ptx.ld16_once(at + u64(u32(g)) * u64(16))
                        values[4 * i], values[4 * i + 1] = w, x
                        values[4 * i + 2], values[4 * i + 3] = y, z
                    for j in range(8):
                        halves = HIGHS if j % 2 else LOWS
                        b0 = ptx.pick_bytes(values[j // 2], values[4 + j // 2], halves)
                        b1 = ptx.pick_bytes(values[8 + j // 2], values[12 + j // 2], halves)
                        at4 = 32 * m + 4 * j
                        d0, d1, d2, d3 = ptx.mma_bf16(
                            p0, p1, p2, p3, b0, b1,
                            acc[at4], acc[at4 + 1], acc[at4 + 2], acc[at4 + 3],
                        )  # fmt: skip
                        acc[at4], acc[at4 + 1], acc[at4 + 2], acc[at4 + 3] = d0, d1, d2, d3
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
            for w in range(WARPS):
                if warp == i32(w):
                    for i in range(outs):
                        m, j, half, odd = i // 32, i % 32 // 4, i % 4 // 2, i % 2
                        dim = i32(64 * m + j + 8 * odd) + i32(c * i32(16))
                        place = u32(i32((g + i32(8 * half)) * i32(head_dim) + dim))
                        merged[place] = acc[i] if w == 0 else f32(merged[place] + acc[i])
                ptx.barrier()
            i = ptx.thread()
            while i < i32(ROWS * quarter):
                one = i32(i >> i32(quarter_shift))
                if i32(done + one) < i32(count << i32(group_shift)):
                    highest, whole = NOTHING, f32(0)
                    for w in range(WARPS):
                        other = tops_of[u32(i32(one + i32(ROWS * w)))]
                        highest = other if other > highest or other != other else highest
                    for w in range(WARPS):
                        mine = u32(i32(one + i32(ROWS * w)))
                        whole += f32(sums_of[mine] * ptx.exp2(f32(tops_of[mine] - highest)))
                    by = f32(0) if whole == f32(0) else ptx.reciprocal(whole)
                    at = u32(i32(i * i32(4)))
                    query = i32(first_row + (i32(done + one) >> i32(group_shift)))
                    place = i32(head * i32(group) + (i32(done + one) & i32(group - 1)))
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


def served(q: Tensor, k_pages: Tensor, v_pages: Tensor, value_dim: int) -> bool:
    """Say whether the kernel serves these shapes and dtypes."""
    page_tokens, kv_heads, head_dim = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    tensors = (q, k_pages, v_pages)
    return (
        all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in tensors)
        and all(t.data_ptr() % 16 == 0 for t in tensors)
        and head_dim in (64, 128)
        and value_dim == head_dim
        and v_pages.shape == k_pages.shape
        and group in (1, 2, 4, 8, 16)
        and page_tokens & (page_tokens - 1) == 0
        and q.numel() > 0
    )


def splits_of(sequences: int, kv_heads: int, tokens: int, processors: int) -> int:
    """Choose a power of two: blocks for two on each processor, and at least 256 tokens in each."""
    splits = 1
    while splits < 16 and sequences * kv_heads * splits < 2 * processors:
        if tokens // (2 * splits) < 256:
            break
        splits *= 2
    return splits


def decode_launch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, integers: list[Tensor], scale: float,
    softcap: float, splits: int,
) -> tuple[Variant, tuple[int, int, int], tuple[float, ...], Tensor, Tensor]:  # fmt: skip
    """Choose variant, grid and arguments, and make the outputs of the splits.

    Shape: integers q_indptr, kv_indptr, kv_indices, lo, hi, all int32
        -> o `[splits, rows, heads, head_dim]` float32, lse `[splits, rows, heads]`
    """
    rows, heads, head_dim = q.shape
    page_tokens, kv_heads = k_pages.shape[1:3]
    variant = decode_pages(
        group=heads // kv_heads, kv_heads=kv_heads, head_dim=head_dim, page_tokens=page_tokens,
        capped=softcap > 0,
    )  # fmt: skip
    o = q.new_empty(splits, rows, heads, head_dim, dtype=torch.float32)
    lse = q.new_empty(splits, rows, heads, dtype=torch.float32)
    grid = (kv_heads, splits, integers[0].numel() - 1)
    pointers = (t.data_ptr() for t in (q, k_pages, v_pages, *integers, o, lse))
    return variant, grid, (*pointers, rows, splits.bit_length() - 1, scale, softcap), o, lse


@paged_attention_op.register_kernel("cuda")
def paged_attention_cuda(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, q_indptr: Tensor, kv_indptr: Tensor,
    kv_indices: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, run: int, shards: int, shard: int,
    value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend on tensor cores; what the kernel does not serve gathers its pages with torch."""
    if alibi_slopes is not None or not served(q, k_pages, v_pages, value_dim) or not usable():
        return paged_attention_reference(
            q, k_pages, v_pages, q_indptr, kv_indptr, kv_indices, lo, hi, scale, softcap,
            alibi_slopes, q_pos, Interleave(run, shards, shard), value_dim,
        )  # fmt: skip
    sequences = q_indptr.numel() - 1
    tokens = kv_indices.numel() * k_pages.shape[1] // max(sequences, 1)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    splits = splits_of(sequences, k_pages.shape[2], tokens, processors)
    integers = [t.int().contiguous() for t in (q_indptr, kv_indptr, kv_indices, lo, hi)]
    variant, grid, args, o, lse = decode_launch(
        q, k_pages, v_pages, integers, scale, softcap, splits
    )
    variant.launch(grid, *args)
    merged, merged_lse = merge_states(o, lse)
    return merged.to(q.dtype), merged_lse


__all__ = ["decode_launch", "decode_pages", "paged_attention_cuda", "served", "splits_of"]
