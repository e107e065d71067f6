"""What a training step sends that no run on meta shows: what FSDP2 gathers and scatters, what stages hand on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...collectives.trace import Event, wire_bytes
from ..data.shards import DTYPES, ends_of, sharding_units
from ..edits import SumGradient
from ..pipeline import Split
from ..plan import Plan

Unit = tuple[str, list[nn.Parameter], bool]  # path, its own parameters, whether it stays gathered


def unseen(
    twin: Any, plan: Plan, split: Split | None, batch: int, tokens: int
) -> tuple[Event, ...]:
    """List them by formula, unit by unit; tests compare them with the traces of real ranks.

    Args:
        twin: cut by what of the plan does run.
        batch: sequences of ``tokens`` tokens in a step.
    """
    events: list[Event] = []
    if plan.dp.size > 1 and plan.dp.kind == "shard":
        events += shard_events(twin, plan, split)
    if split is not None and split.rule is None:  # what crosses else, only a run of values shows
        events += stage_events(twin, plan, split, batch, tokens)
    return tuple(events)


def microbatch_count(plan: Plan) -> int:
    """Runs of a stage in a step."""
    return plan.pp.microbatches or plan.pp.size if plan.pp.size > 1 else 1


def shard_events(twin: Any, plan: Plan, split: Split | None) -> Iterator[Event]:
    """FSDP2: a unit is gathered in forward and, where it was let go of, in backward; its gradients are scattered.

    Under stages all of it happens for every microbatch.
    """
    groups, ranks = twin._plait.ranks.groups, plan.dp.size
    axis = groups.axis_of(groups.group("dp"))
    dtype = DTYPES[getattr(plan.dp, "param_dtype", "model")]
    for path, held, stays in units(twin, split):
        rows = [(-(-p.shape[0] // ranks) * math.prod(p.shape[1:]), p) for p in held]
        gathered = sum(n * (dtype or p.dtype).itemsize for n, p in rows)
        scattered = sum(n * ranks * p.element_size() for n, p in rows if p.requires_grad)
        for _ in range(microbatch_count(plan)):
            yield event("all_gather", axis, ranks, gathered, path)
            if not stays:
                yield event("all_gather", axis, ranks, gathered, f"backward:{path}")
            yield event("reduce_scatter", axis, ranks, scattered, f"backward:{path}")


def units(twin: Any, split: Split | None) -> list[Unit]:
    """What this rank's FSDP2 gathers one at a time, without the experts that it leaves alone."""
    done = twin._plait
    stage = done.ranks.groups.folding.coords(done.ranks.groups.rank)["pp"]
    sums = [e for e in done.edits.done if isinstance(e, SumGradient) and e.over_dp]
    taken = {id(e.module.get_parameter(e.name)) for e in sums}
    paths = {id(module): path for path, module in twin.named_modules()}
    layers = sharding_units(twin)
    found: list[Unit] = []
    for unit in [*layers, *(ends_of(twin, layers) if split is not None else [twin])]:
        path = paths[id(unit)]
        if split is not None and not split.holds(path, stage):
            continue
        own = {id(p): p for p in unit.parameters() if id(p) not in taken}
        taken |= own.keys()
        found.append((path, list(own.values()), unit is twin))
    return found


def stage_events(twin: Any, plan: Plan, split: Split, batch: int, tokens: int) -> Iterator[Event]:
    """Activations to the next stage and their gradients to the one before, one each for every microbatch.

    Shape: [batch / microbatches, seq / cp, hidden]; under tp each rank sends them whole to its own place there.
    """
    groups = twin._plait.ranks.groups
    stage, axis = groups.folding.coords(groups.rank)["pp"], "pp"
    count = microbatch_count(plan)
    cp = plan.size("cp") if plan.kvp.size == 1 else 1
    width = twin.config.get_text_config(decoder=True).hidden_size
    shape = (-(-batch // count), -(-tokens // cp), width)
    size = math.prod(shape) * next(p.element_size() for p in twin.parameters())
    for chunk in split.chunks_of(stage):
        for _ in range(count):
            if chunk < split.chunks - 1:
                yield event(
                    "send", axis, plan.pp.size, size, f"to stage {split.stage_of(chunk + 1)}"
                )
            if chunk > 0:
                where = f"backward:to stage {split.stage_of(chunk - 1)}"
                yield event("send", axis, plan.pp.size, size, where)


def event(op: str, axis: str, ranks: int, payload: int, scope: str) -> Event:
    """Write an event whose shape does not matter."""
    return Event(op, axis, ranks, (), "", payload, wire_bytes(op, payload, ranks), 0.0, scope)
