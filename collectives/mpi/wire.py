"""A tensor as MPI sees it: an address and a datatype, or a packed copy where that is faster.

Three cases, decided per tensor:

* contiguous: its own memory, as bytes;
* strided, with runs of at least `RUN_BYTES`: its own memory, through a derived MPI datatype (no copy in Python);
* else: packed by torch into a contiguous twin, and unpacked from one on arrival.

MPI's own packing walks the runs one by one, torch's copy kernel does not, so short runs are packed
(the idea is TEMPI's, arXiv 2012.14363; the figures are in docs/decisions/011-mpi-backend.md).
Collectives with one buffer for all ranks always use packed twins: MPI libraries cut such a
buffer by counts of the datatype, which would differ between ranks. CUDA tensors go by address to
an MPI that says it can take them, else through pinned memory: `Wire.cuda` says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import OrderedDict
from threading import Lock
from typing import Literal

import torch
from mpi4py import MPI
from torch import Tensor

RUN_BYTES = 512
CACHED_DATATYPES = 256

Message = list  # [memory, count, datatype], as mpi4py takes it
Layout = tuple[int, tuple[tuple[int, int], ...]]  # run bytes, and (count, stride bytes) outside in


def layout(t: Tensor) -> Layout:
    """Describe the memory of a tensor canonically: contiguous runs inside nested strides.

    Dims of one element vanish and dims that continue each other merge, so that equal memory has
    one description however it is viewed. The order is the tensor's own, row-major.
    """
    size = t.element_size()
    run, strides = size, []
    for count, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if count == 1:
            continue
        if not strides and stride * size == run:
            run *= count
        elif strides and stride * size == strides[0][0] * strides[0][1]:
            strides[0] = (strides[0][0] * count, strides[0][1])
        else:
            strides.insert(0, (count, stride * size))
    return run, tuple(strides)


class Wire:
    """How tensors of this process reach MPI.

    Attributes:
        cuda: "direct" (MPI takes device pointers) or "staged" (through pinned memory).

    State: owns the derived datatypes it made, least recently used freed first.
    """

    def __init__(self, cuda: Literal["direct", "staged"] | None = None) -> None:
        self.cuda = cuda or ("direct" if takes_cuda(MPI.COMM_WORLD) else "staged")
        self._datatypes: OrderedDict[Layout, MPI.Datatype] = OrderedDict()
        self._lock = Lock()

    def lend(self, t: Tensor, *, read: bool, strided: bool = False) -> Tensor:
        """Return the tensor itself if MPI can use its memory as it is, else a contiguous twin.

        Args:
            read: MPI will read it, so a twin must hold the values.
            strided: the message may use a derived datatype.
        """
        if t.requires_grad:
            t = t.detach()
        if t.is_cpu and (t.is_contiguous() or (strided and layout(t)[0] >= RUN_BYTES)):
            return t
        if t.is_cuda and self.cuda == "direct":
            twin = (
                t
                if t.is_contiguous()
                else torch.empty_like(t, memory_format=torch.contiguous_format)
            )
        else:
            twin = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        if read and twin is not t:
            twin.copy_(t)
        if t.is_cuda:
            torch.cuda.current_stream(t.device).synchronize()  # MPI knows no streams
        return twin

    @staticmethod
    def land(twin: Tensor, t: Tensor) -> None:
        """Bring what arrived in a twin home."""
        if twin is t or (twin.data_ptr() == t.data_ptr() and twin.device == t.device):
            return
        with torch.inference_mode(t.is_inference()):
            t.detach().copy_(twin)

    def message(self, t: Tensor) -> Message:
        """Describe a lent tensor for one MPI call."""
        if t.is_contiguous():
            return memory(t)
        run, strides = layout(t)
        span = run + sum((count - 1) * stride for count, stride in strides)
        return [MPI.memory.fromaddress(t.data_ptr(), span), 1, self._datatype((run, strides))]

    def _datatype(self, key: Layout) -> MPI.Datatype:
        with self._lock:
            if key in self._datatypes:
                self._datatypes.move_to_end(key)
                return self._datatypes[key]
            if len(self._datatypes) == CACHED_DATATYPES:
                self._datatypes.popitem(last=False)[1].Free()
            made = self._datatypes[key] = _make_datatype(key)
            return made


def memory(t: Tensor) -> Message:
    """Describe contiguous memory as bytes."""
    return span(t.data_ptr(), t.nbytes)


def span(address: int, n_bytes: int) -> Message:
    """Describe a run of memory."""
    return [MPI.memory.fromaddress(address, n_bytes), n_bytes, MPI.BYTE]


def _make_datatype(key: Layout) -> MPI.Datatype:
    run, strides = key
    steps = [MPI.BYTE.Create_contiguous(run)]
    for count, stride in reversed(strides):
        steps.append(steps[-1].Create_hvector(count, 1, stride))
    for inner in steps[:-1]:
        inner.Free()
    return steps[-1].Commit()


def takes_cuda(comm: MPI.Comm) -> bool:
    """Does this MPI say that it takes device pointers?

    MPI 4.1 lists its kinds of memory; Open MPI and MPICH before that have a query function each of the same name.
    """
    if "cuda" in (comm.Get_info().Get("mpi_memory_alloc_kinds") or ""):
        return True
    for loaded in ("libmpi.so.40", "libmpi.so.12"):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(loaded, mode=os.RTLD_NOLOAD)
            return bool(library.MPIX_Query_cuda_support())
    return False
