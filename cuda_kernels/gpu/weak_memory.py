"""Memory as weakly ordered as PTX allows, for the simulator: what a fence does not order comes in the worst order.

A plain store is seen by its own block only, until a release, a fence or the end of the block publishes it. A plain load
sees the buffers as they were when its block began, or when its thread (or one it has met at a barrier) last acquired.
So a store before a flag without a release never arrives, and a load after a flag without an acquire is always stale.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from .simulator import Block, Lane, Memory, SimulationError

Write = tuple[int, bytes]
View = tuple[int, list[bytes]]  # when it was taken, and all regions


class WeakMemory(Memory):
    """Weakly ordered in `regions` (the buffers that ranks share), plain elsewhere.

    Args:
        regions: (address, bytes) of each rank's buffer as this process sees it, in rank order; all of one size.
        multicast: the address that stands for offset 0 of all of them at once.
        delays: draws how many turns a thread loses at each flag; None: none.
        naps: seconds that it may sleep there too, for ranks in other processes.
        device_of: which device a block is on; what has device scope does not reach another one.
    """

    def __init__(
        self,
        regions: Sequence[tuple[int, int]],
        multicast: int = 1 << 56,
        delays: random.Random | None = None,
        naps: float = 0.0,
        device_of: Callable[[Block], Any] = lambda block: "the only one",
    ) -> None:
        self.device_of = device_of
        self.regions, self.multicast, self.delays, self.naps = regions, multicast, delays, naps
        self.clock = 0
        self.views: dict[Any, View] = {}  # of lanes, and of blocks: as they began
        self.hidden: dict[
            Any, list[Write]
        ] = {}  # of lanes, blocks and devices: what others do not see
        self.published: dict[Block, list[tuple[int, Write]]] = {}  # and when

    def load(self, lane: Lane, address: int, size: int) -> bytes:
        region = self._region(address)
        if region is None:
            return super().load(lane, address, size)
        base = self.regions[region][0]
        taken, regions = self._view(lane)
        data = bytearray(regions[region][address - base : address - base + size])
        own = [write for when, write in self.published.get(lane.block, ()) if when > taken]
        mine = (self._device(lane), lane.block, lane)
        for write in (*own, *(write for key in mine for write in self.hidden.get(key, ()))):
            _overlay(data, address, *write)
        return bytes(data)

    def store(self, lane: Lane, address: int, data: bytes) -> None:
        if self._region(address) is None:
            super().store(lane, address, data)
        else:
            self.hidden.setdefault(lane, []).append((address, data))

    def read_flag(self, lane: Lane, address: int, acquire: bool) -> int:
        self._dawdle(lane)
        value = super().read_flag(lane, address, acquire)
        if acquire:
            self._look(lane)
        return value

    def write_flag(self, lane: Lane, address: int, value: int, release: bool) -> None:
        self._dawdle(lane)
        if release:
            self._publish(lane)
        super().write_flag(lane, address, value, release)

    def add(self, lane: Lane, address: int, value: int, acquire: bool) -> int:
        self._dawdle(lane)
        if acquire:  # of device scope: what it publishes stays on the device
            mine = self.hidden.pop(lane.block, []) + self.hidden.pop(lane, [])
            self.hidden.setdefault(self._device(lane), []).extend(mine)
        else:
            self._publish(lane)
        return super().add(lane, address, value, acquire)

    def fence(self, lane: Lane) -> None:
        self._publish(lane)
        self._look(lane)

    def meet(self, block: Block) -> None:
        """A barrier: the block's threads see each other's stores, and what any of them has acquired."""
        together = self.hidden.setdefault(block, [])
        views = [self.views[lane] for lane in block.lanes if lane in self.views]
        for lane in block.lanes:
            together += self.hidden.pop(lane, [])
            if views:
                self.views[lane] = max(views, key=lambda view: view[0])

    def finish(self, block: Block) -> None:
        for key in (self._device(block.lanes[0]), block, *block.lanes):
            self._write(self.hidden.pop(key, []))
            self.views.pop(key, None)
        self.published.pop(block, None)

    def copies(self, address: int) -> Sequence[int]:
        offset = address - self.multicast
        if not 0 <= offset < self.regions[0][1]:
            raise SimulationError(f"{address:#x} is no multicast address")
        return [base + offset for base, _ in self.regions]

    def _device(self, lane: Lane) -> tuple[str, Any]:
        return "device", self.device_of(lane.block)

    def _region(self, address: int) -> int | None:
        inside = (i for i, (base, size) in enumerate(self.regions) if base <= address < base + size)
        return next(inside, None)

    def _view(self, lane: Lane) -> View:
        if lane not in self.views:  # as it was when the block began
            first = self.views.get(lane.block)
            if first is None:
                first = self.views[lane.block] = self._snapshot()
            self.views[lane] = first
        return self.views[lane]

    def _look(self, lane: Lane) -> None:
        self.views[lane] = self._snapshot()

    def _snapshot(self) -> View:
        self.clock += 1
        return self.clock, [ctypes.string_at(base, size) for base, size in self.regions]

    def _publish(self, lane: Lane) -> None:
        mine = (self._device(lane), lane.block, lane)
        writes = [write for key in mine for write in self.hidden.pop(key, ())]
        self._write(writes)
        self.clock += 1
        self.published.setdefault(lane.block, []).extend((self.clock, one) for one in writes)

    def _write(self, writes: list[Write]) -> None:
        for address, data in writes:
            ctypes.memmove(address, data, len(data))

    def _dawdle(self, lane: Lane) -> None:
        if self.delays is None:
            return
        for _ in range(self.delays.choice((0, 0, 1, 2, 30))):
            lane.pause()
        if self.naps and self.delays.random() < 0.3:
            time.sleep(self.delays.random() * self.naps)


def _overlay(data: bytearray, address: int, start: int, written: bytes) -> None:
    """Lay a write over what was loaded from `address`."""
    first, last = max(address, start), min(address + len(data), start + len(written))
    if first < last:
        data[first - address : last - address] = written[first - start : last - start]
