"""Paged decode attention against torch's scaled_dot_product_attention on contiguous keys.

    python benchmarks/paged_attention.py [--context 32768] [--threads 1] [--dtype float32]

Prints milliseconds (min / median / max) of one layer and one query row, the ratio sdpa / paged
(above 1: paged is faster), and the memory bandwidth reached against a plain read of the same bytes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numba
import torch
import torch.nn.functional as F

from plait.cuda_kernels import paged_attention


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time the calls in turn, so that a busy machine disturbs all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def main() -> None:
    """Run one comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shuffled", action="store_true", help="pages in random order")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, tokens, pages = (
        getattr(torch, args.dtype),
        args.context,
        args.context // args.page_tokens,
    )
    shape = (pages, args.page_tokens, args.kv_heads, args.head_dim)
    k_pages, v_pages = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    q = torch.randn(args.rows, args.heads, args.head_dim).to(dtype)
    order = torch.randperm(pages) if args.shuffled else torch.arange(pages)
    k = k_pages[order].flatten(0, 1).transpose(0, 1)[None].contiguous()
    v = v_pages[order].flatten(0, 1).transpose(0, 1)[None].contiguous()
    table = (torch.tensor([0, args.rows]), torch.tensor([0, pages], dtype=torch.int32), order.int())
    lo = torch.zeros(args.rows, dtype=torch.int64)
    hi = torch.full((args.rows,), tokens)
    scale = args.head_dim**-0.5
    calls: dict[str, Callable[[], object]] = {
        "paged": lambda: paged_attention(q, k_pages, v_pages, *table, lo, hi, scale)[0],
        "sdpa gqa": lambda: F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, scale=scale, enable_gqa=True
        ),
        "sdpa repeated kv": lambda: F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.repeat_interleave(args.heads // args.kv_heads, 1),
            v.repeat_interleave(args.heads // args.kv_heads, 1),
            scale=scale,
        ),
        "read": lambda: (k_pages.view(torch.int64).sum(), v_pages.view(torch.int64).sum()),
    }
    ours, theirs = calls["paged"](), calls["sdpa gqa"]()
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    error = (ours.double() - theirs[0].transpose(0, 1).double()).abs().max().item()
    times = interleaved(calls, args.rounds)
    print(
        f"torch {torch.__version__}, numba {numba.__version__}, {platform.machine()}, {args.threads} "
        f"thread(s); context {tokens}, heads {args.heads}/{args.kv_heads}, head_dim {args.head_dim}, "
        f"{args.dtype}, rows {args.rows}, page {args.page_tokens}, difference {error:.1e}"
    )
    mib = (k_pages.numel() + v_pages.numel()) * k_pages.element_size() / 2**20
    for name, ms in times.items():
        middle = statistics.median(ms)
        print(
            f"{name:>17}: {min(ms):8.2f} / {middle:8.2f} / {max(ms):8.2f} ms"
            f"   {mib / 1024 / middle * 1e3:6.1f} GiB/s of KV"
            f"   {name} / paged = {middle / statistics.median(times['paged']):.2f}"
        )


if __name__ == "__main__":
    main()
