"""Paged decode attention beside torch's SDPA and FlexAttention and FlashInfer: the part `decode` of gpu.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_timing import MEGABYTE, Row, attempts, microseconds, rotating, share, tried
from torch import Tensor

from plait.cuda_kernels import coded_attention, paged_attention

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
GOAL = "0.8 of bandwidth at 16 x 32768; never below torch"
CASES = [  # batch, tokens; the largest are left out where the device has no room
    (1, 4096), (1, 131072), (16, 4096), (16, 32768), (64, 4096), (64, 32768), (64, 131072),
]  # fmt: skip
FLEX_CASES = [(16, 4096), (16, 32768)]  # each compiles for half a minute
CODES = (("e4m3", 0, DIM + 4), ("int4", 32, DIM // 2 + DIM // 8))


def decodes(bandwidth: float) -> Iterator[Row]:
    cases = ((f"paged decode, GQA {HEADS}/{KV_HEADS}, batch {b} x {n}", b, n) for b, n in CASES)
    return attempts((name, partial(_case, name, b, n, bandwidth)) for name, b, n in cases)


def _case(name: str, batch: int, tokens: int, bandwidth: float) -> list[Row]:
    """Measure one batch and length; only one of bfloat16 pages and pages of codes lies in memory."""
    torch.cuda.empty_cache()  # the case before was smaller
    kv_bytes = 2 * batch * tokens * KV_HEADS * DIM * 2
    sets = rotating(kv_bytes)
    needed, free = 1.25 * sets * kv_bytes + 1024 * MEGABYTE, torch.cuda.mem_get_info()[0]
    if needed > free:
        told = f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return [{"kernel": name, "skipped": told, "goal": GOAL}]
    q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    integers = _integers(batch, tokens)
    rows = [_plain(name, q, integers, sets, kv_bytes, bandwidth)]
    sdpa = rows[0]["us"] * rows[0]["torch / ours"] if "torch / ours" in rows[0] else None
    pages = batch * tokens // PAGE
    for form, block, size in CODES:
        data = torch.zeros(
            sets, 2, pages * PAGE * KV_HEADS * size, dtype=torch.uint8, device="cuda"
        )
        us = microseconds(
            lambda i, d=data, f=(form, block): coded_attention(
                q, d[i, 0], d[i, 1], f, f, pages, PAGE, KV_HEADS, *integers, scale=DIM**-0.5
            ),
            sets,
        )
        rows.append(share(f"{name}, {form}", us, data[0].nbytes, bandwidth, sdpa, GOAL))
        del data
    return rows


def _integers(batch: int, tokens: int) -> Any:
    """One row for each sequence, pages in order: q_indptr, kv_indptr, kv_indices, lo, hi."""
    each = torch.arange(batch + 1, device="cuda")
    return (
        each, (each * (tokens // PAGE)).int(),
        torch.arange(batch * tokens // PAGE, device="cuda").int(),
        torch.zeros(batch, dtype=torch.int64, device="cuda"),
        torch.full((batch,), tokens, device="cuda"),
    )  # fmt: skip


def _plain(name: str, q: Tensor, integers: Any, sets: int, kv_bytes: int, bandwidth: float) -> Row:
    """Measure bfloat16 pages, ours and the peers'."""
    batch, tokens = len(q), int(kv_bytes // (4 * len(q) * KV_HEADS * DIM))
    shape = (sets, 2, batch * tokens // PAGE, PAGE, KV_HEADS, DIM)
    pages = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
    dense = pages.view(sets, 2, batch, tokens, KV_HEADS, DIM).transpose(3, 4)
    us = microseconds(
        lambda i: paged_attention(q, pages[i, 0], pages[i, 1], *integers, scale=DIM**-0.5), sets
    )
    sdpa = tried("SDPA", lambda: sdpa_us(q, dense))
    row = share(name, us, kv_bytes, bandwidth, sdpa, GOAL)
    peers = {"FlashInfer": lambda: flashinfer_us(q, pages, integers)}
    if (batch, tokens) in FLEX_CASES:
        peers["FlexAttention"] = lambda: flex_us(q, dense)
    for peer, measure in peers.items():
        took = tried(peer, measure)
        if took is not None:
            row[f"{peer} / ours"] = took / us
    return row


def sdpa_us(q: Tensor, dense: Tensor) -> float:
    """Time torch's attention. Shape: dense `[sets, 2, batch, kv_heads, tokens, head_dim]`"""
    return _dense_us(torch.nn.functional.scaled_dot_product_attention, q, dense)


def flex_us(q: Tensor, dense: Tensor) -> float:
    """Time FlexAttention, compiled for the shape."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    return _dense_us(torch.compile(flex.flex_attention, dynamic=False), q, dense)


def _dense_us(attend: Any, q: Tensor, dense: Tensor) -> float:
    queries = q.unsqueeze(2)
    return microseconds(
        lambda i: attend(queries, dense[i, 0], dense[i, 1], enable_gqa=True), len(dense)
    )


def flashinfer_us(q: Tensor, pages: Tensor, integers: Any) -> float:
    """Time FlashInfer's decode, if it is installed."""
    flashinfer: Any = importlib.import_module("flashinfer")
    space = torch.empty(128 * MEGABYTE, dtype=torch.uint8, device="cuda")
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    last = torch.full((len(q),), PAGE, dtype=torch.int32, device="cuda")
    decode.plan(
        integers[1], integers[2], last, HEADS, KV_HEADS, DIM, PAGE,
        q_data_type=q.dtype, kv_data_type=pages.dtype,
    )  # fmt: skip
    return microseconds(lambda i: decode.run(q, (pages[i, 0], pages[i, 1])), len(pages))
