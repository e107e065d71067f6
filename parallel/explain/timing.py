"""Timing: how long each explained collective would take, from the planner's model of a part's network."""

from __future__ import annotations

from dataclasses import replace

from ..planner.catalogue import catalogue, hardware
from ..planner.communication import Network
from ..planner.efficiency import fitted
from ..planner.hardware import Hardware
from .report import Explanation

LADDER = ("h100", "h200", "b200", "b300", "gb200", "gb300")  # tried in this order by `fitting`


def timed(said: Explanation, part: str | Hardware = "") -> Explanation:
    """Put predicted seconds into every collective.

    Args:
        part: a name of the catalogue, a calibrated file, or a Hardware; empty: what `fitting` finds.

    Raises:
        PlanError: no hardware of that name.
    """
    chip = hardware(part) if isinstance(part, str) and part else part or fitting(said)
    assert isinstance(chip, Hardware)
    net, spans = Network(chip, fitted(chip)), _spans(said)
    steps = tuple(
        replace(step, events=tuple(
            replace(event, seconds=float(net.collective(
                event.op, event.ranks, event.sent_bytes, spans.get(event.axis, event.ranks)
            )))
            for event in step.events
        ))
        for step in said.steps
    )  # fmt: skip
    return replace(said, steps=steps, hardware=chip.title)


def fitting(said: Explanation) -> Hardware:
    """Return the first part of `LADDER` that holds what a rank holds, in one domain if any part has such a one."""
    parts = [catalogue()[name] for name in LADDER]
    held = said.weights.most + (
        said.kv.batch_bytes + said.step("decode").workspace_bytes if said.kv else 0
    )
    roomy = [p for p in parts if held + fitted(p).memory_floor <= p.memory.value] or parts[-1:]
    near = [p for p in roomy if said.world_size <= p.domain.value]
    return (near or roomy)[0]


def _spans(said: Explanation) -> dict[str, int]:
    """Return how many consecutive ranks each communicator is spread over: kvp lies across tp, so ``kvp * tp``."""
    spans = {}
    for group in said.communicators:
        n, reach = len(group.ranks), max(group.ranks) - min(group.ranks)
        # a gap after the last rank, like those between
        whole = -(-reach * n // (n - 1)) if n > 1 else 1
        spans |= dict.fromkeys(group.axes, min(whole, max(said.world_size, reach + 1)))
    return spans
