"""Ranks of a group in different calls: in debug mode all of them are shown what two of them do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from plait.collectives import CallMismatch, PeerLost, gloo, shm
from world import current_rank, run_world

MEMBERS = (0, 2)  # of a world of three; they are told their names in the world
SIDES = (
    ("all_reduce of 4 float32 by sum", "all_reduce of 5 float32 by sum"),
    ("all_reduce of 4 float64 by sum", "all_reduce of 4 float32 by sum"),
    ("all_reduce of 4 float32 by max", "all_reduce of 4 float32 by sum"),
    ("all_reduce of 4 float32 by sum", "barrier"),
    ("broadcast of 4 float32, root 0", "broadcast of 4 float32, root 1"),
)


def mistaken(backend: str, folder: str) -> list[str]:
    """Make each mistake in a group of its own; say what came of it."""
    name = {"gloo": gloo.register, "shm": shm.register}[backend]()
    store = dist.FileStore(f"{folder}/store", 3)
    dist.init_process_group(name, store=store, rank=current_rank(), world_size=3)
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    groups = [dist.new_group(list(MEMBERS)) for _ in SIDES]
    first = current_rank() == MEMBERS[0]
    mistakes = [
        lambda g: dist.all_reduce(torch.ones(4 if first else 5), group=g),
        lambda g: dist.all_reduce(torch.ones(4).to(torch.float64 if first else torch.float32), group=g),
        lambda g: dist.all_reduce(torch.ones(4), dist.ReduceOp.MAX if first else dist.ReduceOp.SUM, g),
        lambda g: dist.all_reduce(torch.ones(4), group=g) if first else dist.barrier(g),
        lambda g: dist.broadcast(torch.ones(4), MEMBERS[0 if first else 1], g),
    ]  # fmt: skip
    said = []
    for mistake, group in zip(mistakes, groups, strict=True):
        if current_rank() in MEMBERS:
            with pytest.raises((CallMismatch, PeerLost)) as refusal:
                mistake(group)
            said.append(str(refusal.value))
            if backend == "gloo":  # nothing had begun, so the group still works
                dist.all_reduce(torch.ones(4), group=group)
    return said


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_both_sides_are_shown(backend: str, tmp_path: Path) -> None:
    answers = run_world(mistaken, 3, backend, str(tmp_path), backend=None)
    for number, sides in enumerate(SIDES):
        said = [answers[rank][number] for rank in MEMBERS]
        told = [text for text in said if "different calls" in text]
        assert told, said
        if backend == "gloo":
            assert said[0] == said[1]
            assert "rank 0 is in" in said[0]
            assert "rank 2 in" in said[0]
        for text in told:
            assert all(side in text for side in sides), text
