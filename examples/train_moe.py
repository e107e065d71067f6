"""Train a small mixture of experts under one plan, go on from its checkpoint under another, decode under a third.

torchrun --standalone --nproc-per-node 4 examples/train_moe.py runs/moe
torchrun --standalone --nproc-per-node 8 examples/train_moe.py runs/moe \\
    --plans "dp2:shard cp2 tp2 ep8" "cp2 tp4:sp ep4" "kvp2 tp4 ep4 etp2"
It reads this repository's documentation byte by byte, and draws loss.png and routers.png into the folder.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from moe import batch, build, draw_losses, draw_routers, read_docs, router_load
from rich.progress import track
from torch.distributed.checkpoint import state_dict as states

import plait

PLANS = ["dp2:shard cp2 ep4", "tp2:sp cp2 ep2 etp2", "kvp2 tp2 ep4 etp1"]


def train(plan: plait.Plan, rank: int, begin: int, end: int, args: argparse.Namespace):
    """Train from one step's checkpoint to another's; in one process if the plan is of one rank."""
    cut, text, losses = plan.world_size > 1, read_docs(), torch.zeros(begin)
    model = plait.parallelize(build(), plan) if cut else build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    plait.track_optimizer(model, optimizer)

    def state() -> dict[str, object]:
        moments = states.get_optimizer_state_dict(model, optimizer)
        return {"model": model.state_dict(), "optimizer": moments, "losses": losses}

    if begin:
        dcp.load(found := state(), checkpoint_id=args.folder / f"step-{begin}")
        model.load_state_dict(found["model"])
        states.set_optimizer_state_dict(model, optimizer, found["optimizer"])
    mine = plan.coords(rank)["dp"] if cut else 0  # each copy of the model reads text of its own
    for step in track(range(begin, end), str(plan), disable=rank > 0):
        parts, total = batch(text, step, args.tokens)[mine :: plan.dp.size], torch.zeros(1)
        for ids in parts:
            loss = model(ids, labels=ids).loss / len(parts)
            loss.backward()
            total += loss.detach() / plan.world_size
        plait.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cut:
            torch.distributed.all_reduce(total)
        losses = torch.cat([losses, total])
    if cut:
        dcp.save(state(), checkpoint_id=args.folder / f"step-{end}")
    return model, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plans", nargs=3, default=PLANS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    (first, then, decode), rank = map(plait.Plan.parse, args.plans), plait.init().rank
    half, last = args.steps // 2, args.folder / f"step-{args.steps}"
    train(first, rank, 0, half, args)  # this model is forgotten: what goes on is its checkpoint
    losses = train(then, rank, half, args.steps, args)[1]
    model = plait.parallelize(build(), decode)
    dcp.load(found := {"model": model.state_dict()}, checkpoint_id=last)
    model.load_state_dict(found["model"])
    probe = read_docs()[None, : args.tokens]
    written, loads = model.generate(probe[:, :64], max_new_tokens=64), router_load(model, probe)
    if rank == 0:
        one, alone = train(plait.Plan(), 0, 0, args.steps, args)
        draw_losses(args.folder / "loss.png", alone, losses, half, args.plans)
        draw_routers(args.folder / "routers.png", router_load(build(), probe), loads)
        same = torch.equal(one.generate(probe[:, :64], max_new_tokens=64), written)
        print(bytes(written[0].tolist()).decode(errors="replace"))
        print(f"largest difference of a loss from one process: {(losses - alone).abs().max():.1e}")
        print(f"the model trained in one process writes the same: {'yes' if same else 'no'}")
