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
from torch.nn.parallel import DistributedDataParallel

from jobs import report
from plait.collectives import PeerLost, init
from plait.collectives.mpi import operation, progress, register

TIMEOUT_S = 2.0
PATIENT_S = 1000.0  # as long as nobody waits for it: a stopped rank is given up before


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


def train(model: torch.nn.Module) -> None:
    model(torch.ones(2, 12)).sum().backward()


def go_away(how: str) -> None:
    if how == "raise":
        raise ValueError("my own error")
    after = threading.Timer(0.3, os.kill, (os.getpid(), getattr(signal, f"SIG{how.upper()}")))
    after.daemon = True
    after.start()


def until_lost(model: torch.nn.Module | None) -> str:
    """Talk, or train, until that fails; say how. DDP waits in torch's C++, which makes a RuntimeError of a PeerLost."""
    raised: type[RuntimeError] = PeerLost if model is None else RuntimeError
    try:
        while True:
            if model is not None:
                train(model)
                continue
            talk(asynchronous=False)
            talk(asynchronous=True)
    except raised as error:
        return str(error)


def main(how: str) -> None:
    world = init(register(), timeout_s=200)
    talk(False)
    model = None
    if how.endswith("_in_ddp"):
        how = how.removesuffix("_in_ddp")
        model = DistributedDataParallel(torch.nn.Linear(12, 12))
        train(model)
        train(model)
    patient = how == "stop_patiently"
    if patient:
        operation.STOPPED_S, progress.SILENCE_S = 1.0, 1.0
    dist.group.WORLD.set_timeout(timedelta(seconds=PATIENT_S if patient else TIMEOUT_S))  # type: ignore[union-attr]
    dist.barrier()
    if world.rank == 1:
        go_away(how.removesuffix("_patiently"))
    start = time.monotonic()
    lost = until_lost(model)
    seconds = time.monotonic() - start
    again = ""
    try:
        dist.barrier()
    except PeerLost as error:
        again = str(error)
    report(world.rank, {"lost": lost, "again": again, "seconds": seconds})


if __name__ == "__main__":
    main(sys.argv[1])
