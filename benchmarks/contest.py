"""What the benchmarks of many ranks share: contenders timed in interleaved rounds, and the report.

A contender runs on all ranks or on rank 0 only; the other ranks wait asleep meanwhile. One record is
one call on all its ranks: wall time is the slowest rank's, CPU time is each process's own (all its
threads). When ranks share cores with each other or with other work, read the CPU columns.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Contender:
    """One way to do the work. ``call`` does one step and returns the logits of the last token.

    Attributes:
        everywhere: whether all ranks take part; otherwise rank 0 alone.
        threads: torch threads of each rank that takes part.
    """

    name: str
    call: Callable[[], Tensor]
    everywhere: bool = True
    threads: int = 1
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[list[float]] = field(default_factory=list)
    difference: float = 0.0

    @property
    def takes_part(self) -> bool:
        """Whether this rank runs it."""
        return self.everywhere or rank() == 0


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str = "") -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def launch(script: str, arguments: Sequence[str], ranks: int) -> None:
    """Run a script again under torchrun with some ranks of one thread each, and wait for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", script, *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, env=environ, check=False).returncode
    if code:
        raise SystemExit(code)


def mpirun(script: str, arguments: Sequence[str], ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that run a script again under mpirun; root may, as in a container.

    Raises:
        FileNotFoundError: there is no mpirun, beside this Python or on the path.
    """
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    found = shutil.which("mpirun", path=places)
    if found is None:
        raise FileNotFoundError("no mpirun: pip install 'plait[mpi]'")
    command = [found, "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environ = {**os.environ, **root, "OMP_NUM_THREADS": "1"}
    return [*command, sys.executable, script, *arguments], environ


def launch_mpi(script: str, arguments: Sequence[str], ranks: int) -> None:
    """Run a script again under mpirun, and wait for it."""
    try:
        command, environ = mpirun(script, arguments, ranks)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    code = subprocess.run(command, env=environ, check=False).returncode
    if code:
        raise SystemExit(code)


def launch_parts(script: str, arguments: Sequence[str], parts: dict[str, int], chosen: str) -> None:
    """Run the parts of a script ("both": all), each with its ranks, and a folder that they share."""
    for part, ranks in parts.items():
        if chosen in {part, "both"}:
            with tempfile.TemporaryDirectory() as folder:
                launch(script, [*arguments, "--part", part, "--folder", folder], ranks)


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def record(contender: Contender, *, keep: bool = True) -> Tensor | None:
    """Call a contender once on its ranks together and note its times."""
    if dist.is_initialized():
        dist.barrier()
    out, wall, cpu = None, 0.0, 0.0
    if contender.takes_part:
        torch.set_num_threads(contender.threads)
        begin, busy = time.perf_counter(), time.process_time()
        out = contender.call()
        wall, cpu = time.perf_counter() - begin, time.process_time() - busy
        torch.set_num_threads(1)
    every = torch.tensor([[wall, cpu]], dtype=torch.float64) * 1e3
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(every) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, every)
        every = torch.cat(parts)
    if keep:
        ran = every if contender.everywhere else every[:1]
        contender.wall_ms.append(float(ran[:, 0].max()))
        contender.cpu_ms.append(ran[:, 1].tolist())
    return out


def compete(contenders: Sequence[Contender], rounds: int, warm: int = 1) -> None:
    """Time contenders in turn, round after round; compare each one's logits with the first one's."""
    for _ in range(warm):
        reference: Tensor | None = None
        for contender in contenders:
            out = record(contender, keep=False)
            if reference is None:
                assert out is not None or rank() != 0
                reference = shared(out)
            contender.difference = max(contender.difference, distance(out, reference))
    for number in range(rounds):
        turn = number % len(contenders)  # nobody always follows the same neighbour
        for contender in [*contenders[turn:], *contenders[:turn]]:
            record(contender)


def shared(logits: Tensor | None) -> Tensor:
    """Give every rank the logits of rank 0."""
    size = torch.tensor([0 if logits is None else logits.numel()])
    if not dist.is_initialized():
        assert logits is not None
        return logits
    dist.broadcast(size, 0)
    flat = torch.empty(int(size)) if logits is None or rank() else logits.float().contiguous()
    dist.broadcast(flat, 0)
    return flat


def distance(logits: Tensor | None, reference: Tensor) -> float:
    """The largest difference of any logit on any rank, relative to the largest logit."""
    worst = torch.zeros(1)
    if logits is not None:
        worst[0] = (logits.float() - reference).abs().max() / reference.abs().max()
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def table(title: str, contenders: Sequence[Contender], ours: str) -> str:
    """Lay out the times; ratios are taken round by round against ``ours``, then the median."""
    base = next(c for c in contenders if c.name == ours)
    lines = [
        title,
        columns("", "wall ms", "CPU ms a rank", "CPU ms", "wall", "CPU", "logits"),
        columns("", *["min / median / max"] * 2, "sum", "ratio", "ratio", "differ"),
    ]
    for c in contenders:
        most = [max(r) for r in c.cpu_ms]
        total = [sum(r) for r in c.cpu_ms]
        cells = [spread(c.wall_ms), spread(most), f"{statistics.median(total):.1f}"]
        cells += [f"{ratio(c.wall_ms, base.wall_ms):.2f}"]
        cells += [f"{ratio(most, [max(r) for r in base.cpu_ms]):.2f}", f"{c.difference:.0e}"]
        lines.append(columns(c.name, *cells))
    return "\n".join(lines)


def columns(name: str, *cells: str) -> str:
    """One line of the table."""
    widths = (26, 26, 9, 6, 6, 7)
    return f"{name:28}" + "".join(f"{cell:>{w}} " for cell, w in zip(cells, widths, strict=True))


def spread(values: Sequence[float]) -> str:
    """Smallest, middle and largest."""
    return f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}"


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of a contender's time over ours in the same round."""
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


def heading(*packages: str) -> str:
    """The machine and the versions, without names of hosts or places."""
    versions = []
    for name in ("torch", "transformers", *packages):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor()}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, "
        + ", ".join(versions)
    )


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    model = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return model[0] if model else platform.processor() or platform.machine()
