"""Thousands of random collectives over shm, every result checked; and that a broken protocol does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from plait.collectives import shm
from plait.collectives.shm.steps import SETS as SETS_WORD
from soak import RANKS, Soak
from world import RankError, current_rank, run_world


def soak(folder: str, calls: int, seed: int, sets: int) -> int:
    shm.register()
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("shm", store=store, rank=current_rank(), world_size=RANKS)
    run = Soak(seed)
    for group in run.groups:
        if isinstance(group, shm.ShmGroup):
            group.engine.state[SETS_WORD] = sets - 1
    run.run(calls)
    return calls


def test_a_thousand_calls(tmp_path: Path) -> None:
    run_world(soak, RANKS, str(tmp_path), 1000, 1, 2, backend=None, timeout=300)


def test_one_set_of_slots_does_not_pass(tmp_path: Path) -> None:
    """The negative control: without the second set a rank overwrites what another still reads."""
    with pytest.raises(RankError) as failed:
        run_world(soak, RANKS, str(tmp_path), 10_000, 1, 1, backend=None, timeout=300)
    assert failed.value.kind in ("AssertionError", "CallMismatch", "PeerLost", "Timeout")
