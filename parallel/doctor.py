"""What is installed, what this machine has, and the line that adds what is missing."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from ..collectives.errors import LaunchError
from ..collectives.launch import Launch
from ..cuda_kernels.gpu import toolchain
from ..cuda_kernels.kernel_cache import kept_in

OLDEST_TORCH = (2, 11)
# package -> (what it is for, the line that adds it)
PACKAGES = {
    "numpy": ("kernels on the CPU", "pip install plait"),
    "numba": ("kernels on the CPU", "pip install plait"),
    "transformers": ("transformers models", "pip install 'plait[hf]'"),
    "safetensors": ("loading weights shard by shard", "pip install 'plait[hf]'"),
    "mpi4py": ("mpirun over several hosts", "pip install 'plait[mpi]'"),
    "matplotlib": ("plots of the planner", "pip install 'plait[plot]'"),
}
CUDA_PACKAGES = {"numba-cuda": ("kernels on the GPU", "pip install 'plait[cuda]'")}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        state: "ok", "absent" (plait works without it) or "wrong" (it will not).
        remedy: what would add or mend it; "" where nothing needs to be done.
    """

    topic: str
    value: str
    state: str = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; starts no ranks and opens no network."""
    cuda = CUDA_PACKAGES if torch.cuda.is_available() else {}
    return [
        _package("plait", "", ""),
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        Finding("platform", platform.platform()),
        _torch(),
        *(_package(name, use, line) for name, (use, line) in (PACKAGES | cuda).items()),
        *_devices(),
        _cpu_kernels(),
        *_cuda_kernels(),
        *_peers(),
        Finding("cpu threads", f"{torch.get_num_threads()} of torch"),
        _launcher(),
        _backends(),
        _mpirun(),
    ]


def table(findings: list[Finding]) -> Table:
    """Lay the findings out for a terminal."""
    colors = {"ok": "green", "absent": "yellow", "wrong": "red"}
    grid = Table("", "found", "to add it", title="plait doctor", title_justify="left")
    for finding in findings:  # Text, for rich would read the brackets of plait[mpi] as a style
        value = Text(finding.value, style=colors[finding.state])
        grid.add_row(Text(finding.topic), value, Text(finding.remedy))
    return grid


def _package(name: str, use: str, remedy: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, f"absent (for {use})" if use else "not installed", "absent", remedy)


def _torch() -> Finding:
    found = str(torch.__version__)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        return Finding("torch", f"{found}, too old", "wrong", "pip install 'torch>=2.11'")
    return Finding("torch", f"{found} ({build})")


def _devices() -> list[Finding]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            remedy = "pip install --force-reinstall torch (a CUDA build), or mend the driver"
            return [
                Finding("devices", "CPU; a GPU is there that torch cannot use", "absent", remedy)
            ]
        return [Finding("devices", "CPU")]
    found = []
    for index in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(index)
        found.append(
            Finding(
                f"cuda:{index}",
                f"{it.name}, {it.total_memory / 2**30:.0f} GiB, sm_{it.major}{it.minor}",
            )
        )
    return found


def _cpu_kernels() -> Finding:
    folder = kept_in()
    if folder is None:
        return Finding(
            "CPU kernels",
            "kept nowhere: every process compiles them again",
            "absent",
            "export NUMBA_CACHE_DIR=a folder that can be written",
        )
    return Finding("CPU kernels", f"kept in {folder}")


def _cuda_kernels() -> list[Finding]:
    """Whether kernels can be compiled, and loaded; only where there is a GPU or numba-cuda."""
    if not torch.cuda.is_available():
        return []
    problem = toolchain.problem()
    if problem is None:
        return [Finding("CUDA kernels", "can be compiled and loaded")]
    return [Finding("CUDA kernels", problem.what, "absent", problem.remedy)]


def _peers() -> list[Finding]:
    """Whether devices reach each other's memory, as kernels over ranks need."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if len(devices) < 2:
        return []
    apart = [
        f"cuda:{a} and cuda:{b}"
        for a, b in combinations(devices, 2)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    if not apart:
        return [Finding("peer memory", f"all {len(devices)} devices reach each other's")]
    told = f"not between {', '.join(apart[:3])}{', ...' if len(apart) > 3 else ''}"
    return [
        Finding(
            "peer memory",
            f"{told}: all-reduce and norm, and Helix's exchange, go by NCCL there",
            "absent",
            "nvidia-smi topo -p2p r shows why (often IOMMU or ACS)",
        )
    ]


def _launcher() -> Finding:
    try:
        launch = Launch.detect()
    except LaunchError as error:
        return Finding("launcher", str(error), "wrong", "unset the variables it names")
    if launch.launcher == "alone":
        return Finding(
            "launcher", "none: a world of one (torchrun, mpirun and srun are recognised)"
        )
    return Finding("launcher", f"{launch.launcher}: rank {launch.rank} of {launch.world_size}")


def _backends() -> Finding:
    names = [n for n in ("nccl", "xccl", "gloo", "ucc") if dist.is_backend_available(n)]
    if sys.platform == "linux":
        names.append("shm (ranks of one host)")
    if importlib.util.find_spec("mpi4py") is not None:
        names.append("mpi (under mpirun)")
    return Finding("backends", ", ".join(names))


def _mpirun() -> Finding:
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        return Finding(
            "mpirun", "absent (torchrun works without it)", "absent", "pip install 'plait[mpi]'"
        )
    try:
        said = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            "mpirun", f"{found} does not start: {error}", "wrong", "pip install 'plait[mpi]'"
        )
    first = said.strip().splitlines()[0] if said.strip() else "says no version"
    return Finding("mpirun", f"{found}: {first}")
