"""Ctrl-C while a rank waits for another: it hears it at once, over every backend, and the other is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs import finish, mpirun, start
from plait.collectives import gloo
from plait.collectives.gloo import call
from threads import interrupt_wait
from world import current_rank, run_world

HERE = Path(__file__).parent
JOB = str(HERE / "job_interrupted.py")


@pytest.mark.parametrize(
    "backend", ["gloo", "shm", pytest.param("mpi", marks=pytest.mark.slow, id="mpirun")]
)
def test_who_waits_hears_an_interruption(backend: str, tmp_path: Path) -> None:
    env = {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    if backend == "mpi":
        pytest.importorskip("mpi4py")
        jobs = [start([*mpirun(2), JOB, backend], tmp_path, **env)]
    else:
        command = [sys.executable, JOB, backend]
        jobs = [start(command, tmp_path, RANK=str(r), **env) for r in range(2)]
    ended = [finish(job, tmp_path) for job in jobs]
    said = "".join(job.output for job in ended)
    assert "KeyboardInterrupt" in said, said
    assert ended[0].code != 0, said
    assert 1 in ended[-1].reports, said
    lost, told_s = ended[-1].reports[1]
    assert "rank 0" in lost
    assert "has ended" in lost
    assert "with KeyboardInterrupt" in lost or backend == "shm"
    assert told_s < 100, lost  # within two seconds, on a crowded machine; the groups wait for 600
    assert time.time() - (tmp_path / "interrupted").stat().st_mtime < 200


def interrupted(folder: str, turn_s: float, limit_s: float) -> float:
    """Rank 0 waits in vain, and is told Ctrl-C after half a second; say after how long it heard it."""
    call.TURN_S = turn_s
    store, rank = dist.FileStore(f"{folder}/store", 2), current_rank()
    dist.init_process_group(gloo.register(), store=store, rank=rank, world_size=2)
    dist.barrier()
    dist.group.WORLD.set_timeout(timedelta(seconds=limit_s))  # type: ignore[union-attr]
    begin = time.monotonic()
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt_wait(0.5)
        with pytest.raises(KeyboardInterrupt):
            dist.all_reduce(torch.ones(3))
        store.set("heard", "")
    store.wait(["heard"])
    return time.monotonic() - begin


@pytest.mark.parametrize(("turn_s", "limit_s", "heard"), [(0.25, 150, True), (1e3, 6, False)])
def test_gloo_is_waited_for_in_turns(
    turn_s: float, limit_s: float, heard: bool, tmp_path: Path
) -> None:
    """In one long turn the call ends first, here by its timeout: Python runs no handler meanwhile."""
    seconds = run_world(interrupted, 2, str(tmp_path), turn_s, limit_s, backend=None)[0]
    assert (seconds < limit_s - 0.5) is heard
