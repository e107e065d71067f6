"""A job over the mpi backend in which rank 1 goes away in the middle: stopped, killed, or by an error of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from jobs import report
from plait.collectives import PeerLost, init
from plait.collectives.mpi import operation, progress, register

TIMEOUT_S = 2.0
PATIENT_S = 200.0  # as long as nobody waits for it: a stopped rank is given up before


def talk(asynchronous: bool) -> None:
    """Keep the ranks in collectives of several kinds and sizes."""
    for length in (10, 300_000):
        x = torch.ones(length)
        works = [
            dist.all_reduce(x, async_op=asynchronous),
            dist.broadcast(x, 1, async_op=asynchronous),
        ]
        for work in works:
            if work is not None:
                work.wait()


def go_away(how: str) -> None:
    if how == "raise":
        raise ValueError("my own error")
    after = threading.Timer(0.3, os.kill, (os.getpid(), getattr(signal, f"SIG{how.upper()}")))
    after.daemon = True
    after.start()


def main(how: str) -> None:
    world = init(register(), timeout_s=60)
    talk(False)
    patient = how == "stop_patiently"
    if patient:
        operation.STOPPED_S, progress.SILENCE_S = 1.0, 1.0
    dist.group.WORLD.set_timeout(timedelta(seconds=PATIENT_S if patient else TIMEOUT_S))  # type: ignore[union-attr]
    dist.barrier()
    if world.rank == 1:
        go_away(how.removesuffix("_patiently"))
    start = time.monotonic()
    try:
        while True:
            talk(asynchronous=False)
            talk(asynchronous=True)
    except PeerLost as error:
        lost = str(error)
        seconds = time.monotonic() - start
    again = ""
    try:
        dist.barrier()
    except PeerLost as error:
        again = str(error)
    report(world.rank, {"lost": lost, "again": again, "seconds": seconds})


if __name__ == "__main__":
    main(sys.argv[1])
