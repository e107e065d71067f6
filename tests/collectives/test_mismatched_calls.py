"""Ranks of a group in different calls: in debug mode all of them are shown what two of them do."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from plait.collectives import CallMismatch, gloo, shm
from world import current_rank, run_world

MEMBERS = (0, 2)  # of a world of three; they are told their names in the world
SIDES = (
    ("all_reduce of 4 float32 by sum", "all_reduce of 5 float32 by sum"),
    ("all_reduce of 4 float64 by sum", "all_reduce of 4 float32 by sum"),
    ("all_reduce of 4 float32 by max", "all_reduce of 4 float32 by sum"),
    ("all_reduce of 4 float32 by sum", "barrier"),
    ("broadcast of 4 float32, root 0", "broadcast of 4 float32, root 1"),
    ("all_reduce of [2, 3] float32 by sum", "all_reduce of [3, 2] float32 by sum"),
    ("4 + 6 float32 by sum", "5 + 5 float32 by sum"),
    ("elements in 90 tensors (shapes no. ", "elements in 90 tensors (shapes no. "),
    ("gather of ", "float32, root 0"),
    ("all_to_all of float32 (elements sent [2, 2], received [2, 2])", "received [3, 2])"),
)
ONE_BY_ONE = {
    6: ("all_reduce of 4 float32 by sum", "all_reduce of 5 float32 by sum")
}  # shm's coalesced calls
ONE_BY_ONE[7] = "all_reduce of 9 float32 by sum", "all_reduce of 8 float32 by sum"


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
        lambda g: dist.all_reduce(torch.ones(2, 3) if first else torch.ones(3, 2), group=g),
        lambda g: coalesced(g, [4, 6] if first else [5, 5]),
        lambda g: coalesced(g, [9] * 90 if first else [8] * 90),
        lambda g: dist.gather(torch.ones(4 if first else 5), [torch.ones(4), torch.ones(4)] if first else None, 0, g),
        lambda g: exchanged(g, [2, 2] if first else [3, 2]),
    ]  # fmt: skip
    said = []
    for mistake, group in zip(mistakes, groups, strict=True):
        if current_rank() in MEMBERS:
            with pytest.raises(CallMismatch) as refusal:
                mistake(group)
            said.append(str(refusal.value))
            dist.all_reduce(
                torch.ones(4), group=group
            )  # nothing had begun, so the group still works
    return said


def coalesced(group: dist.ProcessGroup, sizes: list[int]) -> None:
    options = dist.AllreduceCoalescedOptions()
    group.allreduce_coalesced([torch.ones(n) for n in sizes], options).wait()


def exchanged(group: dist.ProcessGroup, rows: list[int]) -> None:
    dist.all_to_all_single(torch.ones(sum(rows)), torch.ones(4), rows, [2, 2], group)


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_both_sides_are_shown(backend: str, tmp_path: Path) -> None:
    answers = run_world(mistaken, 3, backend, str(tmp_path), backend=None)
    for number, sides in enumerate(SIDES):
        said, other = (answers[rank][number] for rank in MEMBERS)
        assert said == other
        assert "different calls" in said
        assert "rank 0 is in" in said
        assert "rank 2 in" in said
        if backend == "shm":
            sides = ONE_BY_ONE.get(number, sides)
        assert all(side in said for side in sides), said


def misaddressed(folder: str) -> list[str]:
    """Send what the receive is not for: as long as many rings, and as long as it should be but of another dtype."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(shm.register(), store=store, rank=current_rank(), world_size=2)
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    group, said = dist.new_group([0, 1], timeout=timedelta(seconds=20)), []
    for sent, received in (
        (torch.ones(600_000), torch.zeros(500_000)),
        (torch.ones(4), torch.zeros(4).int()),
    ):
        if current_rank() == 0:
            dist.send(sent, 1, group)  # and it does not wait for the timeout
        else:
            with pytest.raises(ValueError) as refusal:
                dist.recv(received, 0, group)
            said.append(str(refusal.value))
            assert not received.any()
        dist.all_reduce(torch.ones(4), group=group)
    return said


def test_messages_that_do_not_suit_their_receive(tmp_path: Path) -> None:
    _, (length, dtype) = run_world(misaddressed, 2, str(tmp_path), backend=None)
    assert "600000 float32" in length
    assert "500000 torch.float32" in length
    assert "4 float32" in dtype
    assert "4 torch.int32" in dtype
