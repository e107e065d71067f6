"""A device that is a file: every rank's memory mapped for real, kernels simulated under the weakest memory order."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.collectives.peer_driver import Mapped
from plait.cuda_kernels.gpu.weak_memory import WeakMemory
from world import current_rank


class SharedDriver:
    """See `peer_driver.Driver`.

    Args:
        fails: name of a method that fails on rank 1.
        devices: uuids by rank.
    """

    def __init__(self, folder: str, fails: str = "", devices: str = "abcdefgh") -> None:
        self.folder, self.fails, self.uuid = Path(folder), fails, devices[current_rank()]
        self.device = torch.device("cpu")
        self.maps: dict[int, tuple[Any, int, Path]] = {}
        self.log: list[str] = []
        self.regions: list[tuple[int, int]] = []
        self.steps = 0

    def _do(self, name: str) -> None:
        self.log.append(name)
        if name == self.fails and current_rank() == 1:
            raise RuntimeError(f"{name} was refused")

    def card(self) -> dict[str, Any]:
        self._do("card")
        return {"name": "file", "uuid": self.uuid, "processors": 2, "fp8": True, "problem": ""}

    def objection(self, uuid: str) -> str:
        return "no peer access" if self.fails == "objection" and current_rank() == 1 else ""

    def begin_torch(self, size: int) -> Tensor:
        self._do("begin_torch")
        return torch.zeros(size, dtype=torch.uint8)

    def join_torch(self, own: Tensor, group: Any) -> Mapped:
        paths = [self.folder / f"torch{rank}" for rank in range(group.size())]
        paths[group.rank()].write_bytes(bytes(len(own)))
        group.barrier().wait()
        self._do("join_torch")
        found = [self._map(path) for path in paths]
        self.regions = [(address, len(own)) for address in found]
        return Mapped(found, WeakMemory(self.regions).multicast, own)

    def allocate(self, size: int) -> int:
        self._do("allocate")
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        os.truncate(descriptor, size)
        os.close(descriptor)
        return self._map(Path(name))

    def free(self, address: int) -> None:
        self._do("free")
        self.maps[address][2].unlink()  # who maps it later fails
        self.close(address)
        self.log.pop()

    def export(self, address: int) -> bytes:
        self._do("export")
        return self.maps[address][2].name.encode()

    def open(self, handle: bytes) -> int:
        self._do("open")
        return self._map(self.folder / handle.decode())

    def close(self, address: int) -> None:
        self._do("close")
        del self.maps[address]

    def view(self, address: int, size: int) -> Tensor:
        return torch.frombuffer(self.maps[address][0], dtype=torch.uint8, count=size)

    def beside(self) -> Any:
        return nullcontext()

    def join(self) -> None: ...

    def wait(self) -> None:
        self.log.append("wait")

    def launch(self, variant: Any, grid: Any, *args: float) -> None:
        self.steps += 1
        delays = random.Random(100 * self.steps + current_rank())
        memory = WeakMemory(self.regions, delays=delays, naps=0.005)
        blocks = int(np.prod(grid))
        variant.simulate(grid, *args, memory=memory, resident=blocks, seed=self.steps, timeout=60)

    def _map(self, path: Path) -> int:
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        self.maps[address] = mapped, len(mapped), path
        return address
