"""A training job that checkpoints every step in the background, and goes on from the last whole checkpoint.

    torchrun --nproc-per-node 2 tests/resume.py PLAN FOLDER STEPS

Where TEST_DIES_AFTER is set a host's last rank kills its launcher and itself (SIGKILL) after that step, as a host that
is lost would, while that step's checkpoint may be half written. Where TEST_WAITS_AFTER is set the ranks of one host
alone wait after that step (-1: before the first) until torchrun starts them again with those of another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
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
from plait import Plan, World, clip_grad_norm_, init, parallelize, track_optimizer
from training import coordinate, token_loss

ROWS = 4  # of the whole batch, over dp


def run(plan: str, folder: str, steps: int) -> None:
    """Train up to ``steps``, from the last checkpoint there is; rank 0 writes the losses."""
    world, fitted = init(), Plan.parse(plan).fit(dist.get_world_size())
    model = parallelize(tiny("qwen3"), fitted)
    optimizer = track_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    torch.manual_seed(
        0
    )  # the batches are drawn from torch's own generator, whose state is in the checkpoint
    step, pending = restore(model, optimizer, Path(folder)), None
    interrupt(world, step - 1)
    saving = dist.new_group()  # a save in the background must not meet the step's own collectives
    try:
        while step < steps:
            loss = train_step(model, optimizer, step, fitted.dp.size, coordinate(model))
            dist.all_reduce(loss, dist.ReduceOp.AVG)
            if dist.get_rank() == 0:
                with (Path(folder) / "losses.jsonl").open("a") as file:
                    said = {"step": step, "loss": loss.item(), "plan": str(fitted)}
                    file.write(json.dumps(said) + "\n")
            if pending is not None:
                pending.result()
            step += 1
            pending = dcp.async_save(
                state_of(model, optimizer, step),
                checkpoint_id=f"{folder}/step-{step}",
                process_group=saving,
            )
            dist.barrier()
            interrupt(world, step - 1)
    finally:
        # where a step fails too: a save that begins when the groups are gone takes itself for one of a single process,
        # and what it leaves looks whole
        if pending is not None:
            pending.result()


def interrupt(world: World, step: int) -> None:
    """Do after a step what the environment says."""
    if os.environ.get("TEST_DIES_AFTER") == str(step) and world.local_rank == world.local_size - 1:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TEST_WAITS_AFTER") == str(step) and world.local_size == world.size:
        time.sleep(600)


def train_step(model: Any, optimizer: Any, step: int, parts: int, d: int) -> torch.Tensor:
    """One step on one part of the step's batch; returns the part's loss."""
    seed = int(torch.randint(2, ()))  # alike on every rank
    ids = tokens(ROWS, 12, seed=seed).chunk(parts)[d]
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
        "random": torch.get_rng_state(),
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
    torch.set_rng_state(state["random"])
    return int(state["step"])


def uninterrupted(steps: int) -> list[float]:
    """The losses of one process that nobody kills."""
    model = tiny("qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    return [train_step(model, optimizer, step, 1, 0).item() for step in range(steps)]


if __name__ == "__main__":
    with init():
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
