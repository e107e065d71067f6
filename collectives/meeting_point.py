"""Where ranks meet: a store that all of them can reach.

Where the launcher gives an address (torchrun, MASTER_ADDR, Slurm) the store is there. Under mpirun
on one host rank 0 lets the system choose a free port and tells the others through a file in a
private directory, so two jobs never race for a port. Under mpirun over several hosts the port
travels by an MPI broadcast.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from .errors import LaunchError
from .launch import Launch

POLL_S = 0.02
STALE_S = 86400.0
LAUNCHERS = {"prterun", "prted", "prun", "orterun", "orted", "mpirun", "mpiexec"}
LAUNCHERS |= {"mpiexec.hydra", "hydra_pmi_proxy", "pmi_proxy", "slurmstepd"}


@contextlib.contextmanager
def open_store(launch: Launch, deadline: float, timeout_s: float) -> Iterator[dist.Store]:
    """Open the store; on leaving, the traces of finding it are removed."""
    if launch.world_size == 1:
        yield dist.HashStore()
    elif launch.address is not None and launch.port is not None:
        yield _tcp_store(launch, launch.address, launch.port, timeout_s)
    elif launch.one_host:
        with _private_directory(launch) as folder:
            yield _through_directory(launch, folder, deadline, timeout_s)
    else:
        yield _through_mpi(launch, deadline, timeout_s)


def _tcp_store(launch: Launch, address: str, port: int, timeout_s: float) -> dist.TCPStore:
    host = launch.rank == 0 and not launch.hosted
    try:
        return dist.TCPStore(
            address,
            port,
            launch.world_size,
            is_master=host,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if host:
            raise LaunchError(
                f"rank 0 cannot listen at {address}:{port} ({_first_line(error)}). "
                "Set MASTER_PORT to a free port, the same on all ranks"
            ) from error
        raise LaunchError(
            f"rank 0 of {launch.world_size}, which holds the meeting point at {address}:{port}, did not answer within "
            f"{timeout_s:g} s. Look for its error above, or check MASTER_ADDR and MASTER_PORT"
        ) from error


def _through_directory(
    launch: Launch, folder: Path, deadline: float, timeout_s: float
) -> dist.TCPStore:
    (folder / f"rank-{launch.rank}").touch(mode=0o600)
    if launch.rank == 0:
        store = _tcp_store(launch, "127.0.0.1", 0, timeout_s)
        nonce = secrets.token_hex(16)
        store.set("plait/nonce", nonce)
        unfinished = folder / f"address.{nonce}"
        unfinished.write_text(json.dumps({"port": store.port, "nonce": nonce}))
        unfinished.replace(folder / "address")
        return store
    while time.monotonic() < deadline:
        store = _join(launch, folder / "address", deadline)
        if store is not None:
            return store
        time.sleep(POLL_S)
    came = [int(path.name[5:]) for path in folder.glob("rank-*")]
    raise LaunchError(missing(launch, came, timeout_s) or "rank 0 came but opened no store")


def _join(launch: Launch, file: Path, deadline: float) -> dist.TCPStore | None:
    """Connect to the store that the file names, unless file or store are of an earlier job."""
    try:
        found = json.loads(file.read_text())
        patience = datetime.timedelta(seconds=max(0.1, min(5.0, deadline - time.monotonic())))
        store = dist.TCPStore(
            "127.0.0.1", found["port"], launch.world_size, is_master=False, timeout=patience
        )
        store.wait(["plait/nonce"], patience)
        if store.get("plait/nonce").decode() != found["nonce"]:
            return None
    except (OSError, ValueError, RuntimeError):
        return None
    store.set_timeout(datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
    return store


@contextlib.contextmanager
def _private_directory(launch: Launch) -> Iterator[Path]:
    """A directory that only the ranks of this start of the job share; rank 0 removes it."""
    root = Path(tempfile.gettempdir()) / f"plait-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LaunchError(
            f"{root} must be a directory of yours alone (mode 0700); remove it, or set TMPDIR to another place"
        )
    folder = (
        root
        / hashlib.sha256(f"{launch.job}\n{_launcher_process(launch)}".encode()).hexdigest()[:32]
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield folder
    finally:
        if launch.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            for old in root.iterdir():
                with contextlib.suppress(OSError):
                    if time.time() - old.stat().st_mtime > STALE_S:
                        shutil.rmtree(old)


def _launcher_process(launch: Launch) -> str:
    """Name the process that started the ranks of this host: equal for them, never equal for two jobs."""
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        while pid > 1:
            stat_line = Path(f"/proc/{pid}/stat").read_text()
            name = stat_line[stat_line.index("(") + 1 : stat_line.rindex(")")]
            fields = stat_line[stat_line.rindex(")") + 2 :].split()
            if name in LAUNCHERS:
                return f"{boot} {pid} {fields[19]}"  # the 20th after the name is the start time
            pid = int(fields[1])
    return "" if launch.job else str(os.getppid())


def _through_mpi(launch: Launch, deadline: float, timeout_s: float) -> dist.TCPStore:
    if importlib.util.find_spec("mpi4py") is None:
        raise LaunchError(
            f"{launch.world_size} ranks run on several hosts ({launch.local_size} on this one), and no "
            "meeting point is known. Set MASTER_ADDR to a host name of rank 0 and MASTER_PORT to a free port there "
            "(mpirun -x MASTER_ADDR -x MASTER_PORT), or install mpi4py: pip install 'plait[mpi]'"
        )
    answer: list[dist.TCPStore | BaseException] = []
    # MPI's own start waits for all ranks without end, so it gets a thread that we can leave behind.
    worker = threading.Thread(
        target=lambda: answer.append(_broadcast(launch, timeout_s)), daemon=True
    )
    worker.start()
    worker.join(max(0.1, deadline - time.monotonic()))
    if not answer:
        raise LaunchError(
            f"MPI did not start on all {launch.world_size} ranks within {timeout_s:g} s; a rank is missing"
        )
    if isinstance(answer[0], BaseException):
        raise answer[0]
    return answer[0]


def _broadcast(launch: Launch, timeout_s: float) -> dist.TCPStore | BaseException:
    try:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size != launch.world_size:
            raise LaunchError(
                f"mpi4py sees {MPI.COMM_WORLD.size} ranks where the launcher started {launch.world_size}: it "
                "was built for another MPI than this mpirun. Set MASTER_ADDR and MASTER_PORT, or install "
                "the matching MPI"
            )
        message = bytearray(512)
        store = None
        if launch.rank == 0:
            address = _reachable_address()
            store = _tcp_store(launch, address, 0, timeout_s)
            text = json.dumps([address, store.port]).encode()
            message[: len(text)] = text
        MPI.COMM_WORLD.Bcast([message, MPI.BYTE], root=0)
        address, port = json.loads(message.rstrip(b"\0"))
        return store or _tcp_store(launch, address, port, timeout_s)
    except BaseException as error:  # it crosses a thread and is raised there
        return error


def _reachable_address() -> str:
    """A name of this host that other hosts can reach."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(name).startswith("127."):
            return name
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; asks which of our addresses faces outwards
        return probe.getsockname()[0]
    return name


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def missing(launch: Launch, came: list[int], timeout_s: float) -> str:
    missing = sorted(set(range(launch.world_size)) - set(came))
    if not missing:
        return ""
    whose = "that rank" if len(missing) == 1 else "those ranks"
    return (
        f"{name_ranks(missing)} of {launch.world_size} did not reach plait.init() within {timeout_s:g} s. "
        f"Look for an error of {whose} above, or give slow starters more time: plait.init(timeout_s=...)"
    )


def name_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
