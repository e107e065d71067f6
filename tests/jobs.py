"""Start real jobs from a test: plain processes, torchrun, and mpirun of whatever MPI this environment has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
LAUNCH_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "OMPI_",
    "PMI",
)
LAUNCH_VARIABLES += ("MPI_", "SLURM_", "TORCHELASTIC_", "GROUP_", "OMP_NUM_THREADS", "PYTEST_")


@dataclass(frozen=True)
class Ended:
    """A job that ended: its exit code, all it printed, and what its ranks wrote by `report`."""

    code: int
    output: str
    reports: dict[int, Any]


def find_mpirun() -> str:
    """Find mpirun beside this Python or on the path; skip the test where there is none."""
    found = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("no mpirun; pip install 'plait[mpi]'")
    return found


def mpirun(size: int, *options: str) -> list[str]:
    found = find_mpirun()
    more_than_cores = (
        ["--oversubscribe"] if is_openmpi(found) else []
    )  # Hydra, MPICH's, needs no leave
    return [found, *more_than_cores, "-n", str(size), *options, sys.executable]


def mpi_launcher() -> str:
    """Name this environment's mpirun as `Launch.launcher` does."""
    return "openmpi" if is_openmpi(find_mpirun()) else "mpich"


@cache
def is_openmpi(mpirun: str) -> bool:
    """Say whether an mpirun is Open MPI's, whose options are its own."""
    said = subprocess.run([mpirun, "--version"], capture_output=True, text=True, env=environment())
    return "Open MPI" in said.stdout


def pytest_on(size: int, folder: Path) -> list[str]:
    """pytest on every rank of mpirun.

    Its ranks would clean up old temporary folders at the same time and warn of each other: they get a place of
    their own, and keep all.
    """
    return [
        *("env", f"PYTEST_DEBUG_TEMPROOT={folder}"),
        *mpirun(size),
        *("-m", "pytest", "-p", "no:cacheprovider", "-q", "--with-mpi"),
        *("-o", "tmp_path_retention_count=99"),
    ]


def torchrun(size: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={size}",
    ]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a fresh shell: no traces of a launcher; mpirun may run as root in a container."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCH_VARIABLES)}
    return env | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} | changes


def start(command: Sequence[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        env=environment(TEST_REPORTS=str(folder), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str], folder: Path, timeout: float = 300) -> Ended:
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        job.kill()
        output, _ = job.communicate()
        pytest.fail(f"the job did not end in {timeout} s; it printed:\n{output}")
    reports = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    return Ended(job.returncode, output, reports)


def run_job(command: Sequence[str], folder: Path, **env: str) -> Ended:
    """Run a job to its end; its ranks answer through `report`."""
    return finish(start(command, folder, **env), folder)


def report(rank: int, answer: Any) -> None:
    """Answer from inside a job; standard output would be interleaved."""
    (Path(os.environ["TEST_REPORTS"]) / f"{rank}.json").write_text(json.dumps(answer))


def still_running(folder: Path, seconds: float = 60) -> list[int]:
    """Processes of a job with this folder that have not ended some time after it, stopped ones too."""
    until = time.monotonic() + seconds
    while found := [process for process in Path("/proc").glob("[0-9]*") if _is_of(process, folder)]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return [int(process.name) for process in found]


def _is_of(process: Path, folder: Path) -> bool:
    try:
        return f"TEST_REPORTS={folder}\0".encode() in (process / "environ").read_bytes()
    except OSError:  # it has ended, or is another user's
        return False
