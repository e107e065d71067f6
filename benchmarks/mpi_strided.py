"""A strided tensor between two ranks of MPI: by a derived datatype, or packed by torch and unpacked.

    python benchmarks/mpi_strided.py [--rounds 20] [--sizes 16384 1048576] [--realtime]

The runs of a tensor are so many bytes long, with holes as long between them. Minimum us of an exchange on rank 0, the
later of both ranks; the table in collectives/mpi/strided.py says from which run the datatype is taken, by library.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from contest import launch_mpi
from shm_collectives import hold_core
from torch import Tensor

from plait.collectives.launch import Launch

RUNS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SIZES = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]


def strided(size: int, run: int) -> Tensor:
    return torch.zeros(size // run, run // 2)[:, : run // 4]


def exchange(comm: Any, message: Any, into: Any) -> None:
    requests = [comm.Irecv(into, 1 - comm.rank, 1), comm.Isend(message, 1 - comm.rank, 1)]
    while not all(request.Test() for request in requests):
        pass


def ways(comm: Any, size: int, run: int) -> tuple[Callable[[], None], Callable[[], None]]:
    from plait.collectives.mpi.wire import Wire, memory

    wire = Wire("staged")
    sent, received = strided(size, run), strided(size, run)

    def walk() -> None:
        exchange(comm, wire.message(sent), wire.message(received))

    def pack() -> None:
        twin = torch.empty(sent.shape).copy_(sent)
        landing = torch.empty(received.shape)
        exchange(comm, memory(twin), memory(landing))
        received.copy_(landing)

    return walk, pack


def least(call: Callable[[], None], comm: Any, rounds: int) -> float:
    from mpi4py import MPI

    seconds = []
    for _ in range(rounds):
        comm.Barrier()
        begin = time.perf_counter()
        call()
        seconds.append(comm.allreduce(time.perf_counter() - begin, MPI.MAX))
    return min(seconds) * 1e6


def work(args: argparse.Namespace) -> None:
    hold_core(args, Launch.detect().local_rank)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    print_on_0 = print if comm.rank == 0 else lambda *_: None
    library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0")
    print_on_0(f"{library}: us, datatype : pack, by bytes of a run")
    print_on_0("| message | " + " | ".join(f"{run} B" for run in RUNS) + " |")
    for size in args.sizes:
        cells = []
        for run in RUNS:
            walk, pack = (least(way, comm, args.rounds) for way in ways(comm, size, run))
            cells.append(f"{walk:.0f} : {pack:.0f}")
        print_on_0(f"| {size >> 10} KB | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--realtime", action="store_true")
    args = parser.parse_args()
    if Launch.detect().launcher == "alone":
        launch_mpi(__file__, sys.argv[1:], 2)
    else:
        work(args)


if __name__ == "__main__":
    main()
