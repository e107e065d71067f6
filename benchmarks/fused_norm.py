"""All-reduce + residual add + RMSNorm: one kernel over shared memory against the same in pieces.

    python benchmarks/fused_norm.py [--ranks 2] [--rounds 30] [--rows 1 16 64 256] [--hidden 4096] [--realtime]

Contenders take turns in one world. "gloo + torch": `all_reduce` over gloo, then add and norm by torch into tensors that
were allocated before. "x symmetric": x was produced in `symmetric_empty`, which all ranks see. "ours unfused": the same
`all_reduce` over shm, then our add and norm. "floor": three copies of x by memcpy in one process, for what cannot be
spared: x to the other ranks, the sum and its norm. "copies" (two ranks): what fused and unfused move between the ranks
and at home, by a compiled loop with nothing else (norm_copies.py), past the cache or through it. Each has a group of
its own over shm, for a group learns the cheaper way. Times are us on rank 0, min / median / max over rounds of a mean
of a few calls; ratios are of medians.
`--realtime` (root) gives the ranks SCHED_FIFO and a core each, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from contest import heading, launch, launched, ratio, say, spread
from norm_copies import copies
from shm_collectives import hold_core, turn
from torch import Tensor

EPS = 1e-6
COPIES = {
    "copies past": (True, True),
    "copies": (True, False),
    "unfused copies past": (False, True),
    "unfused copies": (False, False),
}
SHM = ("one-shot", "two-shot", "x symmetric", "ours unfused", "copies")


def contenders(rows: int, hidden: int, gloo: Any, groups: Any) -> dict[str, Callable[[], Any]]:
    """The same work on float32 tensors, by name; `groups` over shm by the names of `SHM`."""
    from plait.collectives import fused
    from plait.collectives.shm import fused as kernel
    from plait.collectives.shm import symmetric_empty
    from plait.cuda_kernels.add_rms_norm import add_rms_norm

    x, residual, weight = torch.randn(rows, hidden), torch.randn(rows, hidden), torch.ones(hidden)
    total, normed, square = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(rows, 1)

    def gloo_and_torch() -> None:
        dist.all_reduce(x, group=gloo)
        torch.add(residual, x, out=total)
        torch.mul(total, total, out=square)
        torch.mean(square, -1, keepdim=True, out=mean)
        mean.add_(EPS).rsqrt_()
        torch.mul(total, mean, out=normed)
        normed.mul_(weight)

    def unfused() -> None:
        dist.all_reduce(x, group=groups["ours unfused"])
        add_rms_norm(x, residual, weight, EPS)

    def one_kernel(name: str, most: int, brought: Tensor) -> Callable[[], Any]:
        def call() -> None:
            if kernel.ONE_SHOT_BYTES[2] != most:  # the first, untimed call of a turn
                kernel.ONE_SHOT_BYTES[2] = most
                kernel.form_of.cache_clear()
            fused.all_reduce_rms_norm(brought, residual, weight, EPS, groups[name])

        return call

    def floor() -> None:
        total.copy_(x)
        normed.copy_(x)
        square.copy_(x)

    shared = symmetric_empty((rows, hidden), group=groups["x symmetric"]).copy_(x)
    found = {
        "one-shot": one_kernel("one-shot", 1 << 40, x),
        "two-shot": one_kernel("two-shot", 0, x),
        "x symmetric": one_kernel("x symmetric", 0, shared),
        "ours unfused": unfused,
        "gloo + torch": gloo_and_torch,
        "floor": floor,
    }
    if groups["copies"].size() == 2 and rows % 2 == 0:
        for name, (fuse, past) in COPIES.items():
            found[name] = copies(x, residual, groups["copies"], fused=fuse, past=past)
    return found


def work(options: argparse.Namespace) -> None:
    """A rank under torchrun."""
    from plait.collectives import shm
    from plait.collectives.shm.fused import schedule

    warnings.simplefilter("ignore")
    hold_core(options, int(os.environ["LOCAL_RANK"]))
    shm.register()
    dist.init_process_group("gloo")  # after, so that its threads have the same priority
    ranks = list(range(dist.get_world_size()))
    groups: Any = {name: dist.new_group(ranks, backend="shm") for name in SHM}
    say(f"{heading('numba')}; {len(ranks)} ranks, hidden {options.hidden}, float32")
    say(f"{'rows':>5} {'':22}{'min / median / max us':>28}{'of ours':>10}")
    sizes = {rows: rows * options.hidden * 4 for rows in options.rows}
    chosen = {
        rows: schedule(rows, options.hidden * 4, len(ranks))[1] for rows in sizes
    }  # before any is forced
    for rows in options.rows:
        size, ours = sizes[rows], "one-shot" if chosen[rows] else "two-shot"
        calls = contenders(rows, options.hidden, dist.group.WORLD, groups)
        times: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for _ in range(options.rounds):
                for name, call in calls.items():
                    times[name].append(turn(call, size, lambda: dist.barrier(groups["copies"])))
        for name, values in times.items():
            mark = " *" if name == ours else ""
            share = f"{ratio(values, times[ours]):.2f}"
            say(f"{rows:>5} {name + mark:22}{spread(values):>28}{share:>10}")
        medians = {name: statistics.median(values) for name, values in times.items()}
        if "copies" in medians:
            bare, apart = (
                min(medians[n], medians[f"{n} past"]) for n in ("copies", "unfused copies")
            )
            parts = f"{bare:.1f} fused, {apart:.1f} unfused: {apart / bare:.2f}"
            say(f"{'':6}only the copies: {parts}; they are {bare / medians[ours]:.0%} of ours")
        least = medians["floor"] / medians[ours]
        say(f"{'':6}{least:.0%} of the memcpy floor; * is what the table chooses")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    if launched():
        work(options)
    else:
        launch(__file__, sys.argv[1:], options.ranks)


if __name__ == "__main__":
    main()
