"""Two ranks: rank 0 waits for rank 1, which does not come, and hears Ctrl-C; three times, and the third ends it."""

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

from jobs import report
from plait.collectives import PeerLost, gloo, init, mpi, shm
from threads import interrupt_wait

REGISTER = {"gloo": gloo.register, "shm": shm.register, "mpi": mpi.register}
DEEP_S = 0.3  # in a wait, before it is interrupted
GROUP_S = 600.0  # that the groups would wait


def main(backend: str) -> None:
    folder = Path(os.environ["TEST_REPORTS"])
    rank = join(backend, folder)
    (waits if rank == 0 else comes_late)(folder, torch.ones(3))


def waits(folder: Path, x: torch.Tensor) -> None:
    """Hear it in a collective and in a message, which go on, as the group does; then in another, to the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # mpirun may have it ignored
    dist.barrier()
    for number, wait in enumerate((dist.all_reduce, dist.recv)):
        interrupt_wait(DEEP_S)
        with pytest.raises(KeyboardInterrupt):
            wait(x)
        (folder / f"heard{number}").touch()
        dist.barrier()
    assert x.tolist() == [2.0] * 3  # of the message, which rank 1 sent after their sum
    interrupt_wait(DEEP_S, (folder / "interrupted").touch)
    dist.all_reduce(x)


def comes_late(folder: Path, x: torch.Tensor) -> None:
    """Come to what rank 0 waited for; say what a call without it gave."""
    dist.barrier()
    for number, come in enumerate((dist.all_reduce, lambda x: dist.send(x, 0))):
        see(folder / f"heard{number}")
        come(x)
        dist.barrier()
    begin = see(folder / "interrupted")
    try:
        dist.recv(x, 0)
    except PeerLost as error:
        report(1, [str(error), time.time() - begin])


def see(sign: Path) -> float:
    """Wait until there is such a file; say when it was made."""
    while not sign.exists():
        time.sleep(0.01)
    return sign.stat().st_mtime


def join(backend: str, folder: Path) -> int:
    if backend == "mpi":
        return init(REGISTER[backend](), timeout_s=GROUP_S).rank
    rank, store = int(os.environ["RANK"]), dist.FileStore(str(folder / "store"), 2)
    limit = timedelta(seconds=GROUP_S)
    name = REGISTER[backend]()
    dist.init_process_group(name, store=store, rank=rank, world_size=2, timeout=limit)
    return rank


if __name__ == "__main__":
    main(sys.argv[1])
