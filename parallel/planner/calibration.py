"""Calibration: figures of this machine, measured in a few seconds and kept in a file that ``--hardware`` reads."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..documents import refusing
from .efficiency import Efficiency, Kernel
from .hardware import Figure, Hardware

SMALL_OPS = 12  # norms, rotary embedding, residuals and reshapes of a layer, in small kernels


def calibrate(device: str = "", rounds: int = 5) -> Hardware:
    """Time a matrix product, a copy and a small kernel here; and an all-reduce where ranks are running.

    Collective: with torch.distributed running, all ranks must call; each sends a few all-reduces of up to 16 MB. Rank
    0's figures are the ones to save.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        flops = _product(device, rounds)
        bandwidth = _copy(device, rounds)
        small = _small(device, rounds)
        latency, link = _collective(device, rounds)
    name = torch.cuda.get_device_name() if device == "cuda" else "this CPU"
    source = f"measured by plait plan --calibrate on {date.today().isoformat()}"
    memory = (
        torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _host_memory()
    )
    assumed = "" if link else "assumed: a tenth of memory bandwidth, no ranks were running; "
    per_way = link or bandwidth / 10
    reached = Kernel(1.0, 1.0, small)
    return Hardware(
        name="this-machine", title=name,
        memory=Figure(float(memory), "B", source),
        memory_bandwidth=Figure(bandwidth, "B/s", source, "read"),
        bf16=Figure(flops, "FLOP/s", source),
        scale_up=Figure(per_way, "B/s", assumed + source, "per direction"),
        domain=Figure(256, "ranks", "assumed: one host"),
        scale_up_latency=Figure(latency or 10 * small, "s", assumed + source),
        scale_out=Figure(per_way, "B/s", "assumed: as within the host", "per direction"),
        scale_out_latency=Figure(latency or 10 * small, "s", "assumed: as within the host"),
        host_link=Figure(bandwidth, "B/s", source, "per direction"),
        constants=Efficiency(
            {"bf16": reached, "fp8": reached, "fp4": reached}, reached, 1.0, layer=SMALL_OPS * small,
            routed=SMALL_OPS * small, step=SMALL_OPS * small, memory_floor=0.5e9, source=source,
        ),
    )  # fmt: skip


def _best(work: Callable[[], Any], device: str, rounds: int) -> float:
    """Return the least seconds of some rounds, the first thrown away."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _product(device: str, rounds: int) -> float:
    size = 8192 if device == "cuda" else 768
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.ones(size, size, device=device, dtype=kind) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: a @ b, device, rounds)


def _copy(device: str, rounds: int) -> float:
    """Bytes per second of a matrix-vector product: it reads its matrix once."""
    rows = 32768 if device == "cuda" else 8192
    matrix, vector = torch.ones(rows, 8192, device=device), torch.ones(8192, device=device)
    return 4.0 * matrix.numel() / _best(lambda: matrix @ vector, device, rounds)


def _small(device: str, rounds: int) -> float:
    x = torch.ones(16, device=device)

    def work() -> None:
        for _ in range(100):
            torch.add(x, x)

    return _best(work, device, rounds) / 100


def _collective(device: str, rounds: int) -> tuple[float, float]:
    """Return an all-reduce's latency and the bandwidth of a large one; zeros without ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, 0.0
    small, large = torch.ones(2, device=device), torch.ones(1 << 22, device=device)
    n = dist.get_world_size()
    latency = _best(lambda: dist.all_reduce(small), device, rounds)
    seconds = _best(lambda: dist.all_reduce(large), device, rounds) - latency
    return latency, 2 * (n - 1) / n * large.numel() * 4 / max(seconds, 1e-9)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def save(found: Hardware, path: str | Path) -> None:
    """Write a calibrated machine as JSON."""
    Path(path).write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")


def load(path: str | Path) -> Hardware:
    """Read what `save` wrote.

    Raises:
        PlanError: not such a file.
    """
    with refusing(
        f"hardware {str(path)!r}",
        "is no calibrated machine",
        "make one with plait plan --calibrate FILE.json",
    ):
        data = json.loads(Path(path).read_text())
        constants = data.pop("constants")
        constants["gemm"] = {unit: Kernel(**kernel) for unit, kernel in constants["gemm"].items()}
        constants["attention"] = Kernel(**constants["attention"])
        notes = tuple(data.pop("notes"))
        plain: dict[str, Any] = {
            key: Figure(**v) if isinstance(v, dict) else v for key, v in data.items()
        }
        return Hardware(**plain, notes=notes, constants=Efficiency(**constants))
