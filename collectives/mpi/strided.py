"""Strided tensors: their MPI datatypes, and when walking one by MPI beats packing it.

MPI's own packing walks the runs one by one, torch's copy kernel does not (TEMPI's idea, arXiv 2012.14363). From which
run on a datatype is faster differs between libraries and sizes: measured, see docs/decisions/011-mpi-backend.md.
Both ends of a message choose for themselves, for it is bytes either way.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from mpi4py import MPI
from torch import Tensor

from ...cuda_kernels.strided import Layout, layout

CACHED_DATATYPES = 256
# By library: up to so many bytes of a message, the least bytes of a run; beyond the last, all are packed.
LEAST_RUNS = {
    "Open MPI": ((64 << 10, 128), (512 << 10, 512)),
    "MPICH": ((2 << 20, 1024), (1 << 62, 4096)),
}


class Datatypes:
    """Derived datatypes of this process.

    State: owns those it made, least recently used freed first.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Layout, MPI.Datatype] = OrderedDict()
        self._lock = Lock()

    def of(self, key: Layout) -> MPI.Datatype:
        """Find the datatype of a layout, or make it."""
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            if len(self._made) == CACHED_DATATYPES:
                self._made.popitem(last=False)[1].Free()
            made = self._made[key] = _make(key)
            return made


def _make(key: Layout) -> MPI.Datatype:
    run, strides = key
    steps = [MPI.BYTE.Create_contiguous(run)]
    for count, stride in reversed(strides):
        steps.append(steps[-1].Create_hvector(count, 1, stride))
    for inner in steps[:-1]:
        inner.Free()
    return steps[-1].Commit()


def least_run(library: str, n_bytes: int) -> int:
    """Look up from how long runs a message of so many bytes travels faster by a datatype; 0: never."""
    table = next((t for name, t in LEAST_RUNS.items() if name in library), LEAST_RUNS["MPICH"])
    return next((run for most, run in table if n_bytes <= most), 0)


def strided_memory(t: Tensor, key: Layout) -> MPI.memory:
    """The memory from a tensor's first byte to its last."""
    run, strides = key
    span = run + sum((count - 1) * stride for count, stride in strides)
    return MPI.memory.fromaddress(t.data_ptr(), span)


__all__ = ["Datatypes", "layout", "least_run", "strided_memory"]
