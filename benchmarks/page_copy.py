"""Page copies against memcpy: whole 2 MiB pages, and pages whose 64 pieces stand in 64 layer regions.

    python benchmarks/page_copy.py [--pages 64] [--rounds 15]

One thread each, interleaved, pages in random order, from and to memory that was touched. "memcpy" is numpy's copy of
2 MiB at a time; "64 regions" gathers (or scatters) the keys and values of 32 layers of an 8B Llama, 32 KiB each. torch
copies what it can with one call a region. Prints GB/s copied (min / median / max) by CPU time, and the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading

from plait.cuda_kernels import Regions, copy_pages

PAGE, LAYERS = 2 << 20, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    count, draws = args.pages, np.random.default_rng(0)
    a, b = (torch.ones(count, PAGE, dtype=torch.uint8) for _ in range(2))
    layers = [torch.ones(count, PAGE // LAYERS, dtype=torch.uint8) for _ in range(LAYERS)]
    pages, rows = draws.permutation(count), draws.permutation(count)
    index, into = torch.from_numpy(pages), torch.from_numpy(rows)
    whole = Regions([a]), Regions([b])
    cut = Regions(layers)
    parts = Regions([b.view(count, LAYERS, -1)[:, i] for i in range(LAYERS)])
    from_, to = a.numpy(), b.numpy()
    calls = {
        "memcpy": lambda: [np.copyto(to[t], from_[f]) for t, f in zip(rows, pages, strict=True)],
        "copy_pages": lambda: copy_pages(whole[1], rows, whole[0], pages),
        "copy_pages, gather 64 regions": lambda: copy_pages(parts, rows, cut, pages),
        "copy_pages, scatter 64 regions": lambda: copy_pages(cut, pages, parts, rows),
        "torch index_copy_": lambda: b.index_copy_(0, into, a.index_select(0, index)),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.rounds + 1):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            if number:
                took[name].append(time.thread_time() - begin)
    print(heading())
    print(f"{count} pages of 2 MiB; GB/s of CPU time, min / median / max, of memcpy")
    for name, seconds in took.items():
        speeds = sorted(count * PAGE / 1e9 / s for s in seconds)
        ratio = statistics.median(m / s for m, s in zip(took["memcpy"], seconds, strict=True))
        spread = f"{speeds[0]:.2f} / {statistics.median(speeds):.2f} / {speeds[-1]:.2f}"
        print(f"{name:32}{spread:>24}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
