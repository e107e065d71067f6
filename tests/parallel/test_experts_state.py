"""Experts in checkpoints: saved under one plan and loaded under another, read from files, written whole, undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from models import tiny, tokens
from plait.parallel import parallelize, unparallelize
from world import run_calls

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint, about its own

# from plan to plan: experts and their matrices move between ep, etp, tp, kvp and dp
MOVES = {
    4: [
        ("tp4 ep2 etp2", "dp2 tp2 ep4", "gpt_oss"),
        ("dp4 ep2 etp2", "kvp2 tp2 etp2", "gpt_oss"),
        ("dp2 tp2 ep4", "tp4", "mixtral"),
        ("tp4", "kvp2 tp2 ep2", "mixtral"),
    ],
}


def differing(model: Any, right: Any) -> list[str]:
    """Names of tensors that are not bitwise the right model's, in the model made whole again."""
    unparallelize(model)
    mine, right = model.state_dict(), right.state_dict()
    assert mine.keys() == right.keys()
    return [name for name in right if not torch.equal(mine[name], right[name])]


def moved(folder: str, first: str, second: str, family: str) -> list[str]:
    """Save under one plan, load under another."""
    dcp.save({"model": parallelize(tiny(family), first).state_dict()}, checkpoint_id=folder)
    model = parallelize(tiny(family, seed=7), second)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    return differing(model, tiny(family))


@pytest.mark.parametrize("ranks", MOVES)
def test_no_shard_is_lost_between_plans(tmp_path: Path, ranks: int) -> None:
    calls = [(moved, str(tmp_path / str(i)), *move) for i, move in enumerate(MOVES[ranks])]
    for answers in run_calls(calls, ranks):
        assert answers == [[]] * len(calls)


def read_and_written(folder: str, plan: str, family: str) -> list[str]:
    """Read slices of a plain checkpoint into a meta model, and write a plain checkpoint from it."""
    right = tiny(family, dtype=torch.float32)
    if dist.get_rank() == 0:
        right.save_pretrained(f"{folder}/plain")
    dist.barrier()
    with torch.device("meta"):
        model = type(right)(right.config).eval()
    parallelize(model, plan, weights=f"{folder}/plain")
    model(tokens(2, 5))
    model.save_pretrained(f"{folder}/again")
    dist.barrier()
    again = type(right).from_pretrained(f"{folder}/again").state_dict()
    wrong = [n for n, t in right.state_dict().items() if not torch.equal(t, again[n])]
    return wrong + differing(model, right)


FILES = [("tp2 ep2", "mixtral"), ("dp2 ep2", "qwen3_moe"), ("tp2 etp2", "gpt_oss")]


def test_files_are_read_in_slices_and_written_whole(tmp_path: Path) -> None:
    calls = [(read_and_written, str(tmp_path / str(i)), *case) for i, case in enumerate(FILES)]
    for answers in run_calls(calls, 2):
        assert answers == [[]] * len(calls)
