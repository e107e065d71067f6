"""A tensor as MPI sees it: an address and a datatype, or a packed copy where that is faster.

Three cases, decided per tensor:

* contiguous: its own memory, as bytes;
* strided, with runs long enough for this library (strided.py): its own memory, through a derived MPI datatype;
* else: packed by torch into a contiguous twin, and unpacked from one on arrival.

Collectives with one buffer for all ranks always use packed twins: MPI libraries cut such a
buffer by counts of the datatype, which would differ between ranks. CUDA tensors go by address to
an MPI that says it can take them, else through pinned memory: `Wire.cuda` says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Literal

import torch
from mpi4py import MPI
from torch import Tensor

from ...cuda_kernels.strided import pack, unpack
from ..sendable import unsendable, wraps
from .strided import Datatypes, layout, least_run, strided_memory

Message = list  # [memory, count, datatype], as mpi4py takes it
Run = tuple[int, int]  # address and bytes


class Wire:
    """How tensors of this process reach MPI.

    Attributes:
        cuda: "direct" (MPI takes device pointers) or "staged" (through pinned memory).

    State: owns the derived datatypes it made.
    """

    def __init__(self, cuda: Literal["direct", "staged"] | None = None) -> None:
        self.cuda = cuda or ("direct" if takes_cuda(MPI.COMM_WORLD) else "staged")
        self._datatypes = Datatypes()
        self._library = MPI.Get_library_version()

    def lend(self, t: Tensor, *, read: bool, strided: bool = False) -> Tensor:
        """Return the tensor itself if MPI can use its memory as it is, else a contiguous twin.

        Args:
            read: MPI will read it, so a twin must hold the values.
            strided: the message may use a derived datatype.
        """
        if t.requires_grad:
            t = t.detach()
        marked = t.is_neg() or t.is_conj()
        if marked or t.layout is not torch.strided or not (t.is_cpu or t.is_cuda) or wraps(t):
            raise unsendable("mpi", t)
        if t.is_cpu and (t.is_contiguous() or (strided and self._walks(t))):
            return t
        if t.is_cuda and self.cuda == "direct":
            twin = t if t.is_contiguous() else pack(t) if read else t.new_empty(t.shape)
        else:
            twin = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            if read:
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
            if t.is_cuda:
                unpack(twin, t.detach())
            else:
                t.detach().copy_(twin)

    @staticmethod
    def apart(brought: Tensor, out: Tensor) -> Tensor:
        """Keep what is sent from what is written meanwhile; both are lent."""
        if brought.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            return brought
        copy = brought.clone()
        if copy.is_cuda:
            torch.cuda.current_stream(copy.device).synchronize()  # MPI knows no streams
        return copy

    def message(self, t: Tensor) -> Message:
        """Describe a lent tensor for one MPI call."""
        if t.is_contiguous():
            return memory(t)
        key = layout(t)
        return [strided_memory(t, key), 1, self._datatypes.of(key)]

    def _walks(self, t: Tensor) -> bool:
        """Say whether MPI should walk the runs of this tensor."""
        least = least_run(self._library, t.nbytes)
        return least > 0 and layout(t)[0] >= least


def memory(t: Tensor) -> Message:
    """Describe contiguous memory as bytes."""
    return span(t.data_ptr(), t.nbytes)


def span(address: int, n_bytes: int) -> Message:
    """Describe a run of memory."""
    return [MPI.memory.fromaddress(address, n_bytes), n_bytes, MPI.BYTE]


def elements_of(t: Tensor, run: Run) -> Tensor:
    """Give the elements of a contiguous tensor that lie in a run of its memory."""
    item = t.element_size()
    return t.view(-1).narrow(0, (run[0] - t.data_ptr()) // item, run[1] // item)


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
