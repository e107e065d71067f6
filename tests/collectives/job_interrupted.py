"""Two ranks: rank 0 waits for rank 1, which does not come, and hears Ctrl-C; three times, and the third ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs import report
from plait.collectives import PeerLost, gloo, init, mpi, shm

REGISTER = {"gloo": gloo.register, "shm": shm.register, "mpi": mpi.register}
DEEP_S = 0.3  # in a wait, before it is interrupted


def main(backend: str) -> None:
    folder = Path(os.environ["TEST_REPORTS"])
    rank = join(backend, folder)
    (waits if rank == 0 else comes_late)(folder, torch.ones(3))


def waits(folder: Path, x: torch.Tensor) -> None:
    """Hear it in a collective and in a message, which go on, as the group does; then in another, to the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # mpirun may have it ignored
    dist.barrier()
    for number, wait in enumerate((dist.all_reduce, dist.recv)):
        interrupt_soon(folder / f"interrupted{number}")
        with pytest.raises(KeyboardInterrupt):
            wait(x)
        (folder / f"heard{number}").touch()
        dist.barrier()
    assert x.tolist() == [2.0] * 3  # of the message, which rank 1 sent after their sum
    interrupt_soon(folder / "interrupted2")
    dist.all_reduce(x)


def comes_late(folder: Path, x: torch.Tensor) -> None:
    """Come to what rank 0 waited for; say what a call without it gave."""
    dist.barrier()
    for number, come in enumerate((dist.all_reduce, lambda x: dist.send(x, 0))):
        see(folder / f"heard{number}")
        come(x)
        dist.barrier()
    begin = see(folder / "interrupted2")
    try:
        dist.recv(x, 0)
    except PeerLost as error:
        report(1, [str(error), time.time() - begin])


def interrupt_soon(sign: Path) -> None:
    """Send Ctrl-C to this process when it has waited for a while."""
    main = threading.main_thread().ident

    def run() -> None:
        since = time.monotonic()
        while time.monotonic() < since + DEEP_S:
            frame, names = sys._current_frames()[main], []  # type: ignore[index]
            while frame is not None:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            since = since if "wait" in names else time.monotonic()
            time.sleep(0.02)
        sign.touch()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=run, daemon=True).start()


def see(sign: Path) -> float:
    """Wait until there is such a file; say when it was made."""
    while not sign.exists():
        time.sleep(0.01)
    return sign.stat().st_mtime


def join(backend: str, folder: Path) -> int:
    if backend == "mpi":
        return init(REGISTER[backend](), timeout_s=60).rank
    rank, store = int(os.environ["RANK"]), dist.FileStore(str(folder / "store"), 2)
    limit = timedelta(seconds=60)
    name = REGISTER[backend]()
    dist.init_process_group(name, store=store, rank=rank, world_size=2, timeout=limit)
    return rank


if __name__ == "__main__":
    main(sys.argv[1])
