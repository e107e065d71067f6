"""The mpi backend against bare mpi4py and gloo, through `torch.distributed`, Python included.

    python benchmarks/mpi_backend.py [--ranks 2] [--rounds 30] [--op all_reduce] [--sizes 4096 1048576]

Starts its ranks with mpirun. Every call is timed alone after a barrier; the contenders take turns of a few
calls, of which the first two only warm the caches. The goal is bare mpi4py + 10 us + 10 %: `over` is what
remains of the minimum and of the median after that. `--realtime` (root): see shm_collectives.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mpi4py
import torch
import torch.distributed as dist
from contest import launch_mpi
from shm_collectives import hold_core

from plait.collectives.launch import Launch
from plait.collectives.mpi import register
from plait.collectives.world import init

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
WARM, TIMED = 2, 10  # calls of a turn
SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]


def contenders(op: str, size: int, comm: Any, gloo: Any) -> dict[str, Callable[[], Any]]:
    """The same work on the same float32 tensors of so many bytes."""
    from mpi4py import MPI

    x, whole, part = (torch.ones(n) for n in (size // 4, size // 4, size // 4 // comm.size))
    a, w, p = x.numpy(), whole.numpy(), part.numpy()
    bare = {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, a),
        "all_gather": lambda: comm.Allgather(p, w),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(a, p),
        "all_to_all": lambda: comm.Alltoall(a, w),
    }

    def through(group: Any, asynchronous: bool = False) -> Callable[[], Any]:
        options = {"group": group, "async_op": asynchronous}
        call = {
            "all_reduce": lambda: dist.all_reduce(x, **options),
            "all_gather": lambda: dist.all_gather_single(whole, part, **options),
            "reduce_scatter": lambda: dist.reduce_scatter_single(part, x, **options),
            "all_to_all": lambda: dist.all_to_all_single(whole, x, **options),
        }[op]
        return (lambda: call().wait()) if asynchronous else call

    return {
        "mpi4py": bare[op],
        "plait": through(None),
        "plait async": through(None, True),
        "gloo": through(gloo),
    }


def measure(calls: dict[str, Callable[[], Any]], rounds: int, comm: Any) -> dict[str, list[float]]:
    """Seconds of every call on rank 0."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for turn in range(WARM + TIMED):
                comm.Barrier()
                start = time.perf_counter()
                call()
                if turn >= WARM:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def row(size: int, seconds: dict[str, list[float]]) -> str:
    """One line: min / median / max in us, ratios of the medians, and the goal."""

    def three(name: str) -> str:
        s = seconds[name]
        return f"{min(s) * 1e6:.1f}/{statistics.median(s) * 1e6:.1f}/{max(s) * 1e6:.0f}"

    def over(of: Callable[[list[float]], float]) -> str:
        return f"{(of(seconds['plait']) - 1.1 * of(seconds['mpi4py'])) * 1e6 - 10:+.1f}"

    ratio = statistics.median(seconds["gloo"]) / statistics.median(seconds["plait"])
    cells = [f"{size >> 10} KB", *map(three, seconds), over(min), over(statistics.median)]
    return "| " + " | ".join([*cells, f"{ratio:.1f}x"]) + " |"


def work(args: argparse.Namespace) -> None:
    hold_core(args, Launch.detect().local_rank)
    world = init(register(), timeout_s=60)
    from mpi4py import MPI

    comm, gloo = MPI.COMM_WORLD.Dup(), dist.new_group(backend="gloo")
    library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0")
    world.print(
        f"torch {torch.__version__}, mpi4py {mpi4py.__version__}, {library}, {world.size} ranks"
    )
    for op in [args.op] if args.op else OPS:
        world.print(
            f"\n{op}: min/median/max us; over the goal in us, of min and median; gloo : plait"
        )
        world.print(
            "| size | mpi4py | plait | plait async | gloo | over min | over median | gloo |"
        )
        world.print("|---|---|---|---|---|---|---|---|")
        for size in args.sizes:
            rounds = max(2, min(args.rounds, args.rounds * (1 << 20) // size))
            world.print(row(size, measure(contenders(op, size, comm, gloo), rounds, comm)))
    world.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--realtime", action="store_true")
    args = parser.parse_args()
    if Launch.detect().launcher == "alone":
        launch_mpi(__file__, sys.argv[1:], args.ranks)
    else:
        work(args)


if __name__ == "__main__":
    main()
