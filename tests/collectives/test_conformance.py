"""Every backend passes the same checks (tests/conformance*.py): one world per backend, all checks in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from conformance_misuse import MISUSES

from conformance import CHECKS, GLOO, Abilities, run_all
from conformance_exchanges import EXCHANGES
from conformance_refusals import REFUSALS
from conformance_users import USERS
from plait.collectives import gloo, shm
from world import current_rank, run_world

RANKS = 4
ALL = (*CHECKS, *EXCHANGES, *REFUSALS, *MISUSES, *USERS)


def on_gloo(folder: str) -> list[str]:
    open_world(gloo.register(), folder)
    return run_all(ALL, GLOO)


def on_shm(folder: str) -> list[str]:
    shm.register()
    open_world("shm", folder)
    return run_all(ALL, Abilities())


def open_world(backend: str, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group(backend, store=store, rank=current_rank(), world_size=RANKS)


@pytest.mark.parametrize("run", [on_gloo, on_shm])
def test_backends_pass_every_check(run, tmp_path: Path) -> None:
    for passed in run_world(run, RANKS, str(tmp_path), backend=None, timeout=200):
        assert passed == [check.__name__ for check in ALL]
