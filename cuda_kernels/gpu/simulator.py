"""Run a CUDA kernel in Python: every thread of a block is a thread here, one of them running at a time.

Unlike numba's simulator it has warps (shuffles, votes, `mma`), knows a divergent barrier and a deadlock when it meets
them, draws the order of the threads from a seed, and takes its memory as an object (`Memory` here is plain; a weakly
ordered one shows a missing fence). Slow: microseconds per word. For tests.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WARP = 32
_here = threading.local()


class SimulationError(RuntimeError):
    """A kernel did what would hang or be undefined on a device."""


class Trap(SimulationError):
    """The kernel called `ptx.trap`."""


class _Stop(BaseException):
    """Unwinds a lane when another one failed."""


def lane() -> Lane:
    """Give the simulated thread that is running.

    Raises:
        SimulationError: called from ordinary Python.
    """
    found = getattr(_here, "lane", None)
    if found is None:
        raise SimulationError("a word of a CUDA kernel was called outside a kernel")
    return found


class Memory:
    """Addresses are addresses of this process; every access takes effect at once."""

    def load(self, lane: Lane, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def store(self, lane: Lane, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def read_flag(self, lane: Lane, address: int, acquire: bool) -> int:
        return ctypes.c_uint32.from_address(address).value

    def write_flag(self, lane: Lane, address: int, value: int, release: bool) -> None:
        ctypes.c_uint32.from_address(address).value = value

    def add(self, lane: Lane, address: int, value: int, acquire: bool) -> int:
        """Add after publishing. Only lanes of this process are apart from each other here."""
        cell = ctypes.c_uint32.from_address(address)
        before = cell.value
        cell.value = before + value & 0xFFFFFFFF
        return before

    def fence(self, lane: Lane) -> None: ...

    def meet(self, block: Block) -> None:
        """All threads of a block are at a barrier."""

    def finish(self, block: Block) -> None:
        """A block has ended: the end of a kernel publishes."""

    def copies(self, address: int) -> Sequence[int]:
        """The addresses that stand behind a multicast address, in rank order."""
        raise SimulationError("this memory has no multicast addresses")


def _closed_gate() -> threading.Lock:
    """One thread waits with `acquire`, another lets it go with `release`."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Offered(list[Any]):
    """What the lanes of a warp have given, and what one of them has made of it for all."""

    result: Any = None


class Block:
    """What the threads of a block share."""

    def __init__(self, index: tuple[int, int, int], grid: tuple[int, int, int], threads: int):
        self.x, self.y, self.z = index
        self.grid, self.threads = grid, threads
        self.arrays: list[np.ndarray] = []
        self.lanes: list[Lane] = []


class Lane:
    """One simulated thread."""

    def __init__(self, block: Block, thread: int, memory: Memory) -> None:
        self.block, self.thread, self.memory = block, thread, memory
        self.number = thread % WARP
        self.go, self.state = _closed_gate(), "ready"
        self.offered: Any = None
        self.taken = Offered()
        self.arrays = 0
        self.scheduler: Scheduler

    # what the words of `ptx` are made of

    def load(self, address: int, size: int) -> bytes:
        return self.memory.load(self, address, size)

    def store(self, address: int, data: bytes) -> None:
        self.memory.store(self, address, data)

    def acquire(self, address: int) -> int:
        return self.memory.read_flag(self, address, acquire=True)

    def relaxed(self, address: int) -> int:
        return self.memory.read_flag(self, address, acquire=False)

    def release(self, address: int, value: int) -> None:
        self.memory.write_flag(self, address, value, release=True)

    def set_relaxed(self, address: int, value: int) -> None:
        self.memory.write_flag(self, address, value, release=False)

    def add(self, address: int, value: int, acquire: bool = False) -> int:
        return self.memory.add(self, address, value, acquire)

    def fence(self) -> None:
        self.memory.fence(self)

    def copies(self, address: int) -> Sequence[int]:
        return self.memory.copies(address)

    def shared(self, length: int, dtype: Any) -> np.ndarray:
        """The n-th call of each thread gives the block's n-th array; a new one holds rubbish."""
        arrays = self.block.arrays
        if self.arrays == len(arrays):
            arrays.append(
                np.frombuffer(b"\xfb" * (length * np.dtype(dtype).itemsize), dtype).copy()
            )
        self.arrays += 1
        return arrays[self.arrays - 1]

    def barrier(self) -> None:
        self._rest("barrier")

    def exchange(self, value: Any) -> Offered:
        """Give a value to the warp and take what all its lanes gave."""
        self.offered = value
        self._rest("warp")
        return self.taken

    def pause(self) -> None:
        self._rest("pausing")

    def _rest(self, state: str) -> None:
        self.state = state
        self.scheduler.back.release()
        self.go.acquire()
        if self.scheduler.failure is not None:
            raise _Stop


class Scheduler:
    """Lets the threads of some blocks run in turn, until all have ended."""

    def __init__(self, blocks: list[Block], memory: Memory, seed: int | None, deadline: float):
        self.blocks, self.memory, self.deadline = blocks, memory, deadline
        self.draw = random.Random(seed) if seed is not None else None
        self.back, self.failure = _closed_gate(), None
        self.failure: BaseException | None

    def run(self, body: Callable[[], None]) -> None:
        lanes = [one for block in self.blocks for one in block.lanes]
        workers = [
            threading.Thread(target=self._live, args=(one, body), daemon=True) for one in lanes
        ]
        for one, worker in zip(lanes, workers, strict=True):
            one.scheduler = self
            worker.start()
        try:
            self._turns(lanes)
        except SimulationError as error:
            self.failure = error
        for one in lanes:  # after a failure: let them unwind, one by one
            if one.state != "done":
                one.go.release()
                self.back.acquire()
        for worker in workers:
            worker.join()
        if self.failure is not None:
            raise self.failure

    def _live(self, one: Lane, body: Callable[[], None]) -> None:
        one.go.acquire()
        _here.lane = one
        try:
            if self.failure is None:
                with np.errstate(all="ignore"):  # registers wrap and divide by zero in silence
                    body()
        except _Stop:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        one.state = "done"
        self.back.release()

    def _turns(self, lanes: list[Lane]) -> None:
        waiting = lanes
        while self.failure is None:
            ready = [one for one in waiting if one.state == "ready"]
            if not ready:
                waiting = [one for one in waiting if one.state != "done"]
                if not waiting:
                    return
                self._wake(waiting)
                continue
            if self.draw is not None:
                self.draw.shuffle(ready)
            for one in ready:
                one.go.release()
                self.back.acquire()
                if self.failure is not None:
                    return

    def _wake(self, waiting: list[Lane]) -> None:
        """Nobody runs: end barriers and warp operations that are complete, and the pauses."""
        woken = False
        for block in self.blocks:
            live = [one for one in block.lanes if one.state != "done"]
            if live and all(one.state == "barrier" for one in live):
                if len(live) != len(block.lanes):
                    raise SimulationError(
                        f"block {block.x}: {len(block.lanes) - len(live)} threads ended, the others wait at a barrier"
                    )
                self.memory.meet(block)
                for one in live:
                    one.state = "ready"
                woken = True
            for first in range(0, len(block.lanes), WARP):
                woken |= self._warp(block.lanes[first : first + WARP])
        for one in waiting:
            if one.state == "pausing":
                one.state, woken = "ready", True
        if not woken:
            raise SimulationError("deadlock: " + self._where(waiting))
        if time.monotonic() > self.deadline:
            raise SimulationError("no end in sight: " + self._where(waiting))
        time.sleep(0)

    def _warp(self, warp: list[Lane]) -> bool:
        if len(warp) < WARP or any(one.state != "warp" for one in warp):
            return False
        values = Offered(one.offered for one in warp)
        for one in warp:
            one.taken, one.state = values, "ready"
        return True

    def _where(self, waiting: list[Lane]) -> str:
        counts: dict[str, int] = {}
        for one in waiting:
            key = f"block {one.block.x},{one.block.y} {one.state}"
            counts[key] = counts.get(key, 0) + 1
        return "; ".join(f"{count} threads of {where}" for where, count in counts.items())


def run(
    body: Callable[..., None],
    grid: int | tuple[int, ...],
    threads: int,
    *args: Any,
    memory: Memory | None = None,
    resident: int = 1,
    seed: int | None = None,
    timeout: float = 60,
) -> None:
    """Run `body(*args)` for every thread of a grid.

    Args:
        memory: how accesses take effect; plain without it.
        resident: how many blocks run at once; those that wait for each other must all be resident.
        seed: draws the order of the threads; None: by number.
        timeout: seconds after which threads that still wait are an error.

    Raises:
        SimulationError: a barrier that some threads do not reach, a deadlock, a time-out or a trap.
    """
    sizes = (grid,) if isinstance(grid, int) else grid
    x, y, z = (*sizes, 1, 1)[:3]
    memory = memory or Memory()
    order = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    deadline = time.monotonic() + timeout
    for first in range(0, len(order), resident):
        blocks = [Block(index, (x, y, z), threads) for index in order[first : first + resident]]
        for block in blocks:
            block.lanes = [Lane(block, thread, memory) for thread in range(threads)]
        Scheduler(blocks, memory, seed, deadline).run(lambda: body(*args))
        for block in blocks:
            memory.finish(block)
