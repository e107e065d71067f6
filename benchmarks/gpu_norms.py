"""Measure which schedule of the fused norm is fastest at which size on this host's devices; print the table's line.

    torchrun --standalone --nproc-per-node 8 benchmarks/gpu_norms.py [--hidden 8192]

The line belongs in `MEASURED` of collectives/norm_schedule.py. Beside it: an all-reduce of NCCL and `add_rms_norm`.
Not yet run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import plait
from plait.collectives import primitive
from plait.collectives.norm_schedule import MOST_BYTES, ONE, SWITCH, TWO
from plait.collectives.peer_norm import make_norm
from plait.cuda_kernels.add_rms_norm import add_rms_norm

RUNS, STEPS = 20, 20


def microseconds(call: Callable[[], Any]) -> float:
    """Take the median over graphs of many steps; the slowest rank's."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            call()
    times = []
    for _ in range(RUNS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1000 / STEPS)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    return primitive.all_reduce(slowest, dist.group.WORLD, dist.ReduceOp.MAX).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hidden", type=int, default=8192)
    hidden = parser.parse_args().hidden
    world = plait.init()
    group = dist.group.WORLD
    if world.device.type != "cuda" or group is None or world.size < 2:
        print("not measured: needs two CUDA devices, and torchrun")
        return
    norm = make_norm(group)
    switch = norm.buffer.multicast != 0
    steps: list[tuple[int, str]] = []
    rows = 1
    while rows * hidden * 2 <= MOST_BYTES * (world.size // 2 if switch else 1):
        x = torch.randn(rows, hidden, device="cuda").bfloat16()
        weight, size = torch.ones(hidden, device="cuda").bfloat16(), x.nbytes
        times = {}
        for schedule in (ONE, TWO, *([SWITCH] if switch else [])):
            norm.steps = ((size, schedule),)
            if norm.schedule(x, x, weight, None, None) == schedule:
                times[schedule] = microseconds(
                    lambda x=x, w=weight: norm(x, x, w, None, 1e-5, None)
                )
        nccl = microseconds(
            lambda x=x, w=weight: add_rms_norm(primitive.all_reduce(x.clone(), group), x, w, 1e-5)
        )
        best = min(times, key=lambda name: times[name])
        if times[best] < nccl:
            steps = [step for step in steps if step[1] != best] + [(size, best)]
        if world.rank == 0:
            told = "  ".join(f"{name} {us:7.1f}" for name, us in times.items())
            print(f"{size >> 10:6} KiB  {told}  NCCL and norm {nccl:7.1f} us", flush=True)
        rows *= 2
    if world.rank == 0:
        key = (torch.cuda.get_device_name(), world.size, switch)
        print(f"    {key}: {tuple(steps)},")


if __name__ == "__main__":
    main()
