"""Groups that come and go leave nothing behind: no file descriptor, no thread, no shared memory."""

from __future__ import annotations

from datetime import timedelta
from operator import gt
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from plait.collectives import gloo, shm
from threads import appears
from world import current_rank, run_world

ROUNDS = 20


def opened(backend: str, folder: str, number: int = 0) -> None:
    name = {"gloo": gloo.register, "shm": shm.register}[backend]()
    dist.init_process_group(
        name or backend,
        store=dist.FileStore(f"{folder}/{number}", 2),
        rank=current_rank(),
        world_size=2,
        timeout=timedelta(seconds=30),
    )


def held() -> tuple[int, int, int]:
    """File descriptors, threads, shared memory in the address space."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    shared = sum("memfd:" in line or "/dev/shm" in line for line in maps)
    fds, threads = (list(Path(f"/proc/self/{of}").iterdir()) for of in ("fd", "task"))
    return len(fds), len(threads), shared


def come_and_go(backend: str, folder: str) -> tuple[list[int], list[int]]:
    """Say what was held at most after the first rounds, and what is held when the last has had time to end."""
    seen = []
    for number in range(ROUNDS):
        opened(backend, folder, number)
        x = torch.ones(10)
        dist.all_reduce(x)
        pair = dist.new_group([0, 1])
        dist.all_reduce(x, group=pair, async_op=True).wait()
        dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0)
        del pair
        dist.destroy_process_group()
        seen.append(held())
    most = [seen[1][0], max(threads for _, threads, _ in seen[1:6]), seen[1][2]]
    appears(lambda: not any(map(gt, held(), most)), 20)  # threads are about to end
    return most, list(held())


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_groups_that_come_and_go_leave_nothing(backend: str, tmp_path: Path) -> None:
    for most, last in run_world(come_and_go, 2, backend, str(tmp_path), backend=None, timeout=200):
        assert not any(map(gt, last, most)), (last, most)  # what stays is more with every round
