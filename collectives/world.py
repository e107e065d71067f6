"""`init`: from whatever started this process to a world of ranks."""

from __future__ import annotations

import atexit
import datetime
import importlib
import itertools
import math
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist

from .errors import BackendUnavailable, LaunchError
from .launch import Launch
from .rendezvous import meet

OURS = ("gloo", "mpi", "shm")
"""Backends that plait adds to torch, each a package beside this file that is imported when it is asked for."""

CHOSEN = "chosen by the caller"
"""How the description of a default group begins whose backend somebody asked for."""

# A world may be closed and opened again; its keys in a shared store must differ.
_visits = itertools.count()


@dataclass(frozen=True)
class World:
    """This rank's place in the world, and its device.

    Also a context manager: `with plait.init() as world:` closes it at the end.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    launcher: str
    threads: int
    # the process group, where this init started it; a copy in another process has none
    started: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    def print(self, *values: Any, **options: Any) -> None:
        """Print on rank 0 only."""
        if self.rank == 0:
            print(*values, flush=True, **options)

    def close(self) -> None:
        """End the process group, if this `init` started it; a second call does nothing."""
        if self.started is not None and self.started is dist.group.WORLD:
            dist.destroy_process_group()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "started": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def init(
    backend: str | None = None, timeout_s: float = 300, *, environ: Mapping[str, str] | None = None
) -> World:
    """Join the world that torchrun, mpirun or Slurm started; without a launcher, a world of one.

    A second call returns the same world. A process group that the caller has started already is taken as it is.

    Args:
        backend: "nccl", "gloo", "mpi", "shm", or any backend registered with torch.distributed; None takes nccl
            where CUDA is, else gloo, and gives the groups of a plan shared memory where their ranks are on one host.
        timeout_s: how long to wait for ranks that have not come, and later for a collective.
        environ: read in place of the process environment.

    Collective: every rank; opens the default process group.

    Raises:
        ValueError: a timeout that is none.
        LaunchError: launchers disagree, a rank is missing, or one failed; the same on every rank.
        BackendUnavailable: the backend is not there; says what to install.
        Exception: what else went wrong on this rank, such as its device; the others get a LaunchError.
    """
    if not 0 < timeout_s < math.inf:
        raise ValueError(
            f"timeout_s={timeout_s} is no time to wait; give a number of seconds above 0, e.g. 300"
        )
    launch = Launch.detect(environ)
    if dist.is_initialized():
        return _adopt(launch, backend)
    card: dict[str, Any] = {"host": socket.gethostname(), "cpus": _cpus(), "backend": backend}
    refusal: Exception | None = None
    name, device = "gloo", torch.device("cpu")
    try:
        name = _choose_backend(backend)
        device = _choose_device(name, launch)
        card["device"] = _device_name(device)
    except Exception as error:  # whatever it is, the others need not wait for this rank
        refusal = error
        card["error"] = str(error) or type(error).__name__
    try:
        store, cards = meet(launch, card, timeout_s, objection=_objection, visit=next(_visits))
    except LaunchError:
        if refusal is not None:
            raise refusal from None
        raise
    threads = _set_threads(launch, cards)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _open(launch, name, store, timeout_s, chosen=backend is not None)
    return World(
        rank=launch.rank,
        size=launch.world_size,
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        device=device,
        backend=name.removeprefix("plait_"),
        launcher=launch.launcher,
        threads=threads,
        started=dist.group.WORLD,
    )


def _open(launch: Launch, backend: str, store: Any, timeout_s: float, *, chosen: bool) -> None:
    """Start the default process group."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    if chosen and dist.group.WORLD is not None:
        dist.group.WORLD._set_group_desc(f"{CHOSEN}: {backend}")
    atexit.register(_close_at_exit, os.getpid())


def _adopt(launch: Launch, backend: str | None) -> World:
    """Describe the process group that is there already."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if launch.launcher != "alone" and (launch.rank, launch.world_size) != (rank, size):
        raise LaunchError(
            f"the process group says rank {rank} of {size}, but {launch.launcher} started rank {launch.rank} of "
            f"{launch.world_size}; let plait.init() start the process group, or start it with the launcher's numbers"
        )
    name = dist.get_backend().removeprefix("plait_")
    if name == "undefined" or ":" in name:
        name = "nccl" if torch.cuda.is_available() else "gloo"
    if backend is not None and backend != name:
        raise LaunchError(
            f"backend={backend!r} was asked for, but the process group already runs {name!r}; close it first"
        )
    known = launch.launcher != "alone" or size == 1
    device = (
        torch.device("cuda", torch.cuda.current_device()) if name == "nccl" else torch.device("cpu")
    )
    return World(
        rank=rank,
        size=size,
        local_rank=launch.local_rank if known else rank,
        local_size=launch.local_size if known else size,
        device=device,
        backend=name,
        launcher=launch.launcher if known else "caller",
        threads=torch.get_num_threads(),
    )


def _choose_backend(asked: str | None) -> str:
    if asked is None:
        asked = "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if asked == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise BackendUnavailable(
            "backend 'nccl' needs a CUDA device and a torch built for CUDA; neither `plait.init()` nor "
            "`plait.init('gloo')` does. On a machine with a GPU: pip install --force-reinstall torch"
        )
    if asked in OURS:
        return importlib.import_module(f".{asked}", __package__).register()
    if not dist.is_backend_available(asked):
        there = [name for name in dist.Backend.backend_list if dist.is_backend_available(name)]
        raise BackendUnavailable(
            f"there is no backend {asked!r} here; there are: {', '.join(there)}"
        )
    return asked


def _choose_device(backend: str, launch: Launch) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")
    # A launcher may show each rank all devices of the host, or its own only.
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


def _objection(cards: list[dict[str, Any]]) -> str:
    """Why these ranks cannot be one world; rank 0 asks, all are told."""
    backends = [card["backend"] for card in cards]
    if len(set(backends)) > 1:
        return f"ranks ask for different backends, by rank: {backends}; give plait.init() the same on all"
    owners: dict[tuple[str, str], int] = {}
    for rank, card in enumerate(cards):
        other = owners.setdefault((card["host"], card["device"]), rank)
        if other != rank and card["device"] != "cpu":
            return (
                f"ranks {other} and {rank} would share one CUDA device on host {card['host']}, which NCCL cannot do; "
                "start one rank for each device, or run on the CPU: plait.init('gloo')"
            )
    return ""


def _cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _set_threads(launch: Launch, cards: list[dict[str, Any]]) -> int:
    """Share the CPUs among the ranks that may run on them, unless OMP_NUM_THREADS has decided."""
    mine = cards[launch.rank]
    sharing = sum(
        card["host"] == mine["host"] and not set(card["cpus"]).isdisjoint(mine["cpus"])
        for card in cards
    )
    if sharing > 1 and not launch.threads_given:
        torch.set_num_threads(max(1, len(mine["cpus"]) // sharing))
    return torch.get_num_threads()


def _close_at_exit(process: int) -> None:
    if os.getpid() != process:  # a fork of a rank is none
        return
    # After an error other ranks may be stuck in a collective, and NCCL would wait for them: then just go.
    if dist.is_initialized() and not hasattr(sys, "last_type"):
        dist.destroy_process_group()
