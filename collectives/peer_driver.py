"""What peer-mapped memory asks of a device: the narrow seam between `symmetric.py` and CUDA."""

from __future__ import annotations

import ctypes
import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..cuda_kernels.gpu import toolchain

HANDLE_BYTES = 64


@dataclass(frozen=True)
class Mapped:
    """Every rank's memory as this process sees it, in rank order.

    Attributes:
        addresses: where each rank's memory begins.
        multicast: the address that stands for all of them at once; 0 where no switch does that.
        keeps: what must live as long as the memory.
    """

    addresses: list[int]
    multicast: int = 0
    keeps: Any = None


class Driver(Protocol):
    """A device and its memory. Methods raise when the device refuses; none of them talks to other ranks."""

    device: torch.device

    def card(self) -> dict[str, Any]:
        """Say who this is: `name`, `uuid`, `processors`, `fp8`, and `problem`, "" if kernels can be used."""
        ...

    def objection(self, uuid: str) -> str:
        """Say why memory of another device cannot be reached from this one; "" if nothing is known against it."""
        ...

    def begin_torch(self, size: int) -> Tensor:
        """Allocate zeros for torch's symmetric memory."""
        ...

    def join_torch(self, own: Tensor, group: dist.ProcessGroup) -> Mapped:
        """Meet the other ranks there; collective."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate zeros that can be exported."""
        ...

    def free(self, address: int) -> None: ...

    def export(self, address: int) -> bytes:
        """Name memory for other processes."""
        ...

    def open(self, handle: bytes) -> int: ...

    def close(self, address: int) -> None: ...

    def view(self, address: int, size: int) -> Tensor:
        """See memory as bytes of a tensor; it does not own them."""
        ...

    def launch(self, variant: Any, grid: Any, *args: float) -> None:
        """Start a kernel on the current stream."""
        ...

    def beside(self) -> AbstractContextManager[Any]:
        """Start things that wait for what was started so far, and for which later work does not wait."""
        ...

    def join(self) -> None:
        """Let later work wait for what was started beside."""
        ...

    def wait(self) -> None:
        """Wait until all that was started is done."""
        ...


class CudaDriver:
    """The current CUDA device, by torch and cuda-python. Not yet run on a GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.side = torch.cuda.Stream(self.device, priority=-1)

    def card(self) -> dict[str, Any]:
        it = torch.cuda.get_device_properties(self.device)
        return {
            "name": it.name,
            "uuid": str(it.uuid),
            "processors": it.multi_processor_count,
            "fp8": (it.major, it.minor) >= (8, 9),
            "problem": str(toolchain.problem() or ""),
        }

    def objection(self, uuid: str) -> str:
        own = self.device.index
        for other in range(torch.cuda.device_count()):  # a launcher may show each rank its own only
            there = str(torch.cuda.get_device_properties(other).uuid) == uuid
            if there and other != own and not torch.cuda.can_device_access_peer(own, other):
                return f"cuda:{own} has no peer access to cuda:{other} (see nvidia-smi topo -p2p r)"
        return ""

    def begin_torch(self, size: int) -> Tensor:
        memory = importlib.import_module("torch.distributed._symmetric_memory")
        return memory.empty(size, dtype=torch.uint8, device=self.device).zero_()

    def join_torch(self, own: Tensor, group: dist.ProcessGroup) -> Mapped:
        memory = importlib.import_module("torch.distributed._symmetric_memory")
        torch.cuda.synchronize(self.device)  # the zeros are there before anybody looks
        met = memory.rendezvous(own, group)
        addresses = [int(address) for address in met.buffer_ptrs]
        if addresses[group.rank()] != own.data_ptr():
            raise RuntimeError("the tensor does not begin where torch's memory of it does")
        return Mapped(addresses, int(met.multicast_ptr or 0), (own, met))

    def allocate(self, size: int) -> int:
        runtime = _runtime()
        address = int(_checked("cudaMalloc", runtime.cudaMalloc(size)))
        _checked("cudaMemset", runtime.cudaMemset(address, 0, size))
        torch.cuda.synchronize(self.device)
        return address

    def free(self, address: int) -> None:
        _checked("cudaFree", _runtime().cudaFree(address))

    def export(self, address: int) -> bytes:
        handle = _checked("cudaIpcGetMemHandle", _runtime().cudaIpcGetMemHandle(address))
        return ctypes.string_at(int(handle.getPtr()), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        runtime = _runtime()
        named = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(int(named.getPtr()), handle, HANDLE_BYTES)
        done = runtime.cudaIpcOpenMemHandle(named, runtime.cudaIpcMemLazyEnablePeerAccess)
        return int(_checked("cudaIpcOpenMemHandle", done))

    def close(self, address: int) -> None:
        _checked("cudaIpcCloseMemHandle", _runtime().cudaIpcCloseMemHandle(address))

    def view(self, address: int, size: int) -> Tensor:
        return torch.as_tensor(_Bytes(address, size), device=self.device)

    def launch(self, variant: Any, grid: Any, *args: float) -> None:
        variant.launch(grid, *args)

    def beside(self) -> AbstractContextManager[Any]:
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.side)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


class _Bytes:
    """Bytes of a device, for torch."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def _runtime() -> Any:
    return importlib.import_module("cuda.bindings.runtime")


def _checked(what: str, answer: tuple[Any, ...]) -> Any:
    """Give what a call of the runtime gave, or raise what it says."""
    error, *given = answer
    if int(error) != 0:
        _, text = _runtime().cudaGetErrorString(error)
        told = text.decode() if isinstance(text, bytes) else text
        raise RuntimeError(f"{what}: {told}")
    return given[0] if given else None
