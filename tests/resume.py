"""A training job that checkpoints every step in the background, and goes on from the last whole checkpoint.

    torchrun --nproc-per-node 2 tests/resume.py PLAN FOLDER STEPS [KILLED_AT]

The last rank kills itself (SIGKILL) after the step KILLED_AT, while that step's checkpoint may be half written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from models import tiny, tokens
from plait import Plan, clip_grad_norm_, init, parallelize, track_optimizer
from training import coordinate, token_loss

ROWS = 4  # of the whole batch, over dp


def run(plan: str, folder: str, steps: int, killed_at: int = -1) -> None:
    """Train up to ``steps``, from the last checkpoint there is; rank 0 writes the losses."""
    fitted = Plan.parse(plan).fit(dist.get_world_size())
    model = parallelize(tiny("qwen3"), fitted)
    optimizer = track_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    step, pending = restore(model, optimizer, Path(folder)), None
    saving = dist.new_group()  # a save in the background must not meet the step's own collectives
    while step < steps:
        loss = train_step(model, optimizer, step, fitted.dp.size, coordinate(model))
        dist.all_reduce(loss, dist.ReduceOp.AVG)
        if dist.get_rank() == 0:
            with (Path(folder) / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
        if pending is not None:
            pending.result()
        step += 1
        pending = dcp.async_save(
            state_of(model, optimizer, step),
            checkpoint_id=f"{folder}/step-{step}",
            process_group=saving,
        )
        dist.barrier()
        if step - 1 == killed_at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if pending is not None:
        pending.result()


def train_step(model: Any, optimizer: Any, step: int, parts: int, d: int) -> torch.Tensor:
    """One step on one part of the step's batch; returns the part's loss."""
    ids = tokens(ROWS, 12, seed=step % 2).chunk(parts)[d]
    model.loss_function = token_loss
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach().clone()


def state_of(model: Any, optimizer: Any, step: int) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": torch.tensor(step),
    }


def restore(model: Any, optimizer: Any, folder: Path) -> int:
    """Load the last checkpoint that was finished (it has its metadata); returns its step, or 0."""
    whole = [p.parent for p in folder.glob("step-*/.metadata")]
    dist.barrier()
    if not whole:
        return 0
    state = state_of(model, optimizer, 0)
    last = max(whole, key=lambda p: int(p.name.removeprefix("step-")))
    dcp.load(state, checkpoint_id=last)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(state["step"])


def uninterrupted(steps: int) -> list[float]:
    """The losses of one process that nobody kills."""
    model = tiny("qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return [train_step(model, optimizer, step, 1, 0).item() for step in range(steps)]


if __name__ == "__main__":
    with init():
        run(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
