"""RMSNorm with a residual, and the merge of partials by lse, against memcpy of equal bytes.

    python benchmarks/row_kernels.py [--rounds 15] [--threads 1] [--only norm]

Bytes: the norm reads x and residual and writes their sum and its norm (4 tensors); a merge of N partials reads N and
writes one. "memcpy" moves half as many bytes from and half to memory that was touched, with as many threads. "operator"
is the public call, which allocates its results; "kernel" writes to results that were touched before. In turns, by CPU
time of one thread or wall time of several; GB/s of memcpy, then shares of it as min / median / max.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading

from plait.cuda_kernels import add_rms_norm as norm
from plait.cuda_kernels import merge
from plait.cuda_kernels.workers import run_shares

Calls = dict[str, Callable[[], object]]
DTYPES = (torch.float32, torch.bfloat16)
NORMS = ((16, 4096), (64, 4096), (512, 4096), (2048, 1024), (128, 16384), (4096, 4096))


def copies(n_bytes: int, threads: int) -> Callable[[], object]:
    """A memcpy that reads and writes so many bytes in all."""
    a, b = (np.ones(n_bytes // 2, np.uint8) for _ in range(2))
    cuts = [len(a) * i // threads for i in range(threads + 1)]

    def part(i: int) -> None:
        np.copyto(b[cuts[i] : cuts[i + 1]], a[cuts[i] : cuts[i + 1]])

    return lambda: run_shares(part, threads)


def touched(make: Callable[[torch.Tensor], torch.Tensor], kept: dict[tuple, torch.Tensor]):
    """Allocate a result once, and give it again."""
    count = iter(range(1 << 60))

    def room_like(x):
        key = (next(count) % 2, tuple(x.shape), x.dtype)
        if key not in kept:
            kept[key] = make(x).zero_()
        return kept[key]

    return room_like


def norms(rows: int, width: int, dtype: torch.dtype) -> tuple[int, Calls]:
    x, residual, weight = (
        torch.randn(s).to(dtype) for s in ((rows, width), (rows, width), (width,))
    )
    return 4 * x.nbytes, {"operator": lambda: norm.add_rms_norm(x, residual, weight, 1e-5)}


def merges(shards: int, rows: int, dtype: torch.dtype) -> tuple[int, Calls]:
    o, lse = torch.randn(shards, rows, 32, 128).to(dtype), torch.randn(shards, rows, 32)
    n_bytes = (o.nbytes + lse.nbytes) // shards * (shards + 1)
    return n_bytes, {
        "operator": lambda: merge.merge_states(o, lse),
        "torch": lambda: merge.merge_states_reference(o, lse),
    }


def measure(name: str, n_bytes: int, calls: Calls, module, rounds: int, threads: int) -> None:
    clock = time.thread_time if threads == 1 else time.perf_counter
    turns = max(1, (8 << 20) // n_bytes)
    plain, kept = module.room_like, touched(module.room_like, {})
    calls = {"memcpy": copies(n_bytes, threads), "kernel": calls["operator"], **calls}
    took: dict[str, list[float]] = {one: [] for one in calls}
    for number in range(rounds + 1):
        for one, call in calls.items():
            module.room_like = kept if one == "kernel" else plain
            begin = clock()
            for _ in range(turns if one != "torch" else 1):
                call()
            if number:
                took[one].append((clock() - begin) / (turns if one != "torch" else 1))
    module.room_like = plain
    base = took.pop("memcpy")
    told = f"{name:38}{n_bytes / 1e6:8.1f} MB {n_bytes / 1e9 / statistics.median(base):6.1f} GB/s"
    for one, seconds in took.items():
        share = sorted(m / s for m, s in zip(base, seconds, strict=True))
        told += f"  {one} {share[0]:.2f} / {statistics.median(share):.2f} / {share[-1]:.2f}"
    print(told, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["norm", "merge"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(heading("numba"))
    for dtype in DTYPES:
        for rows, width in NORMS if args.only != "merge" else ():
            n_bytes, calls = norms(rows, width, dtype)
            name = f"add + RMSNorm, {rows} x {width}, {str(dtype)[6:]}"
            measure(name, n_bytes, calls, norm, args.rounds, args.threads)
        for shards in (2, 8) if args.only != "norm" else ():
            for rows in (1, 16, 512, 2048):
                n_bytes, calls = merges(shards, rows, dtype)
                name = f"merge of {shards}, {math.prod((rows, 32))} x 128, {str(dtype)[6:]}"
                measure(name, n_bytes, calls, merge, args.rounds, args.threads)


if __name__ == "__main__":
    main()
