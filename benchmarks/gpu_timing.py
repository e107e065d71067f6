"""How CUDA kernels are timed: events, buffers that rotate, medians; and rows of the table."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

RUNS, CALLS, MEGABYTE = 30, 200, 1 << 20
AHEAD = (
    1_000_000  # clock cycles, half a millisecond: the host queues a call while the device sleeps
)
COLD = 256 * MEGABYTE  # several second caches

Row = dict[str, Any]


def microseconds(call: Callable[[int], Any], buffers: int = 1) -> float:
    """Take the median of events around `call(i)`, i going round the buffers.

    The device sleeps before each call, so what the host needs to launch it is not in the time, unless the call waits
    for the device.
    """
    for i in range(3):
        call(i % buffers)
    times = []
    for i in range(RUNS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        before.record()
        call(i % buffers)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1000)
    return statistics.median(times)


def host_microseconds(call: Callable[[], Any]) -> float:
    """Time many small calls one after the other, by the host's clock: what one launch costs it."""
    for _ in range(3):
        call()
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / CALLS * 1e6)
    return statistics.median(times)


def rotating(moved: float) -> int:
    """How many sets of buffers of so many bytes are more than the second cache holds."""
    return max(1, min(32, -(-COLD // int(moved))))


def graphed(call: Callable[[], Any]) -> Callable[[int], Any]:
    """Capture a call, and give its replay."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda _: graph.replay()


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy."""
    a, b = (torch.empty(512 * MEGABYTE, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * a.numel() / microseconds(lambda _: b.copy_(a)) * 1e6


def share(
    name: str, us: float, moved: float, bandwidth: float, torch_us: float | None, goal: str
) -> Row:
    """One row of the table."""
    row = {
        "kernel": name,
        "us": us,
        "of copy bandwidth": moved / (us * 1e-6) / bandwidth,
        "goal": goal,
    }
    return row if torch_us is None else {**row, "torch / ours": torch_us / us}


def attempts(cases: Iterable[tuple[str, Callable[[], list[Row]]]]) -> Iterator[Row]:
    """Measure cases in turn: one that fails is told and the others go on, unless it took the device along."""
    for name, measure in cases:
        try:
            yield from measure()
            torch.cuda.synchronize()
        except Exception as error:  # the others are still worth having
            traceback.print_exc()
            yield failure(name, first_line(error))
            try:
                torch.cuda.synchronize()
            except Exception:
                yield failure(f"all after {name}", "the kernel before has lost the CUDA context")
                return


def failure(name: str, why: str) -> Row:
    """The row of what was not measured but should have been."""
    return {"kernel": name, "skipped": f"FAILED, {why}", "goal": "", "failed": True}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def tried(name: str, measure: Callable[[], float]) -> float | None:
    """Measure a peer; where it is absent or fails, say so and give None."""
    try:
        return measure()
    except Exception as error:  # whatever a peer raises, ours are still measured
        print(f"  {name} not measured: {first_line(error)}", flush=True)
        return None


def line(row: Row) -> str:
    """A row for people."""
    if "skipped" in row:
        return f"{row['kernel']:60} skipped: {row['skipped']}"
    told = f"{row['kernel']:60} {row['us']:9.1f} us"
    part = row.get("of copy bandwidth")
    told += f"  {part:5.2f} of copy" if part else " " * 15
    peers = {key: ratio for key, ratio in row.items() if key.endswith("/ ours")}
    told += "".join(f"  {ratio:6.2f}x {key.split(' /')[0]}" for key, ratio in peers.items())
    return f"{told}   (goal: {row['goal']})"
