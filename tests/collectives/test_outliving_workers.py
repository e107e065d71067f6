"""A rank that ends while processes it started live on: they hold what it had open, and must not hide its end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from plait.collectives import PeerLost, gloo, shm
from plait.collectives.gloo.sockets import Sockets
from world import current_rank, run_world

RANKS, VICTIM = 3, 2
REGISTER = {"gloo": gloo.register, "shm": shm.register}
LONG_S = 60.0  # a worker's, more than anybody here waits


class Slow(Dataset):
    """Its first row is there at once, the next one is computed for long: its worker looks at nothing else."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> torch.Tensor:
        if row:
            (Path(self._folder) / f"worker{os.getpid()}").touch()
            time.sleep(LONG_S)
        return torch.ones(2)


def start_loader(folder: str) -> object:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # ranks of a test are
    rows = iter(DataLoader(Slow(folder), num_workers=1, multiprocessing_context="fork"))
    next(rows)
    return rows


def start_program(folder: str) -> object:
    """One that takes what this process has open, as `os.system` has it."""
    code = f"import time; time.sleep({LONG_S})"
    program = subprocess.Popen([sys.executable, "-S", "-c", code], close_fds=False)
    (Path(folder) / f"worker{program.pid}").touch()
    return program


STARTS = {"loader": start_loader, "program": start_program}


def live_and_end(folder: str, backend: str, starts: str, end: str, timeout_s: float) -> None:
    opened(folder, backend, VICTIM, timeout_s)
    started = STARTS[starts](folder)
    while not workers(folder):
        time.sleep(0.01)
    assert started is not None
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


def opened(folder: str, backend: str, rank: int, timeout_s: float) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    name = REGISTER[backend]()
    dist.init_process_group(name, store=store, rank=rank, world_size=RANKS)
    dist.all_reduce(torch.ones(3))
    dist.group.WORLD.set_timeout(timedelta(seconds=timeout_s))  # type: ignore[union-attr]


def workers(folder: str) -> list[int]:
    """Those that the victim has started."""
    return [int(path.name.removeprefix("worker")) for path in Path(folder).glob("worker*")]


def outlived(
    folder: str, backend: str, starts: str, end: str, timeout_s: float = LONG_S, hold: bool = False
) -> str:
    """Rank 0 forks the victim; say what the others are told, and that its workers were alive by then."""
    victim, seen = 0, Path(folder) / f"seen{1 - current_rank()}"
    with patch.object(Sockets, "let_go", lambda self: None) if hold else contextlib.nullcontext():
        if current_rank() == 0 and (victim := os.fork()) == 0:
            live_and_end(folder, backend, starts, end, timeout_s)
        opened(folder, backend, current_rank(), timeout_s)
        with pytest.raises(PeerLost) as lost:
            dist.all_reduce(torch.ones(3))
    (Path(folder) / f"seen{current_rank()}").touch()
    if current_rank() == 0:
        while not seen.exists():
            time.sleep(0.01)
        os.waitpid(victim, 0)
        for worker in workers(folder):
            os.kill(worker, signal.SIGKILL)  # it is there still
    return str(lost.value)


@pytest.mark.parametrize("backend", ["gloo", "shm"])
@pytest.mark.parametrize(
    ("starts", "end"), [("loader", "kill"), ("loader", "exit"), ("program", "kill")]
)
def test_its_end_is_seen_at_once(backend: str, starts: str, end: str, tmp_path: Path) -> None:
    for said in run_world(outlived, 2, str(tmp_path), backend, starts, end, backend=None):
        assert "rank 2 (process" in said
        assert "has ended" in said
        assert "within" not in said, "the others waited for a timeout"


def test_a_worker_that_holds_the_sockets_hides_it(tmp_path: Path) -> None:
    """The negative control: then only a timeout tells."""
    for said in run_world(
        outlived, 2, str(tmp_path), "gloo", "loader", "kill", 2.0, True, backend=None
    ):
        assert "did not end within 2 s: rank 2 (process" in said
