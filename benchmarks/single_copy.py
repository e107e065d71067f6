"""One copy between processes (process_vm_readv, as Open MPI's CMA) against two by way of shared memory.

    python benchmarks/single_copy.py [--rounds 50] [--realtime]

A producer writes its private memory anew each round and copies it into a shared slot; a consumer then copies it out
of the slot, and reads the same bytes out of the producer's private memory. "first" and "second" are the two copies, by
two processors one after the other; "one" is the system call. Minimum us of the rounds. It tells from which size
single-copy reads pay in collectives that only move bytes (docs/decisions/010-shm-backend.md).
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

from contest import heading
from numpy import empty, frombuffer, uint8

SIZES = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
HALF_PAGE = 2048


class Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def hold(core: int, realtime: bool) -> None:
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})
    if realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))


def produce(pipe: Any, shared: mmap.mmap, rounds: int, realtime: bool) -> None:
    hold(1, realtime)
    slot = ctypes.addressof(ctypes.c_char.from_buffer(shared)) + HALF_PAGE
    own = empty(max(SIZES), uint8)
    pipe.send((os.getpid(), own.ctypes.data))
    for size in SIZES:
        for number in range(rounds):
            own[:size] = number % 251
            pipe.send(timed(lambda size=size: ctypes.memmove(slot, own.ctypes.data, size)))
            pipe.recv()


def consume(pipe: Any, shared: mmap.mmap, rounds: int, realtime: bool) -> None:
    hold(0, realtime)
    slot = ctypes.addressof(ctypes.c_char.from_buffer(shared)) + HALF_PAGE
    own = empty(max(SIZES), uint8)
    own[:] = 255
    pid, there = pipe.recv()
    read = ctypes.CDLL(None, use_errno=True).process_vm_readv
    read.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
    read.restype = ctypes.c_ssize_t
    for size in SIZES:
        here, theirs = Piece(own.ctypes.data, size), Piece(there, size)
        ends = (ctypes.addressof(here), 1, ctypes.addressof(theirs), 1, 0)
        times: list[tuple[float, float, float]] = []
        for number in range(rounds):
            first = pipe.recv()
            second = timed(lambda size=size: ctypes.memmove(own.ctypes.data, slot, size))
            own[:size] = 255
            one = timed(lambda ends=ends: read(pid, *ends))
            if own[size - 1] != number % 251:
                raise SystemExit("process_vm_readv is not allowed here: shm must copy twice")
            times.append((first, second, one))
            pipe.send(None)
        first, second, one = (min(column) for column in zip(*times, strict=True))
        print(f"{size >> 10:>6} K {first:>9.1f} {second:>9.1f} {one:>9.1f} {one / second:>12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    shared = mmap.mmap(-1, max(SIZES) + 2 * HALF_PAGE)
    frombuffer(shared, uint8)[:] = 0  # pages are there
    ours, theirs = multiprocessing.Pipe()
    print(heading("numba"))
    print(f"{'':8} {'first':>9} {'second':>9} {'one':>9} {'one : second':>12}   us, minimum")
    child = multiprocessing.get_context("fork").Process(
        target=produce, args=(theirs, shared, options.rounds, options.realtime)
    )
    child.start()
    consume(ours, shared, options.rounds, options.realtime)
    child.join()


if __name__ == "__main__":
    main()
