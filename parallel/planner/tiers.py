"""Tiers: where cached prefixes wait for their next prompt, and weights that stream from the host (MoE-Lens)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .candidates import Candidates
from .columns import Array
from .goals import Goal
from .memory import request_bytes
from .points import Points
from .precision import element_bytes
from .shapes import Decoder
from .step_time import Machine

DEVICE, HOST, RECOMPUTE = "device", "host", "recompute"


def tiers_of(goal: Goal) -> tuple[str, ...]:
    """Return the tiers worth pricing: where nothing waits, the device is as good as any and costs nothing."""
    free = not goal.cached or (not goal.idle and DEVICE in goal.tiers)
    return (DEVICE,) if free else goal.tiers


def recomputed(goal: Goal) -> Goal:
    """Return the same goal with no cached prefix: the whole context is a prompt."""
    return replace(goal, prompt=goal.context, idle=0)


def fetching(
    model: Decoder, machine: Machine, goal: Goal, c: Candidates, tier: str, apart: bool = False
) -> Array:
    """Return the seconds in which a rank's share of one cached prefix comes from its tier.

    Args:
        apart: whether the device that has it is another rank's, at the other end of the network.
    """
    part = machine.part
    share = request_bytes(model, c, goal.cached, element_bytes(machine.kv))
    if tier == DEVICE:
        near = goal.ranks <= part.domain.value
        link = part.scale_up.each_way if near else part.scale_out.each_way
        return share / link * (apart and goal.idle > 0)
    if tier == RECOMPUTE:
        return 0.0 * share
    link = part.host_link.each_way
    if tier != HOST:
        link = min(link, part.disk_link.each_way if part.disk_link else 0.0)
    return share / link if link else np.inf + share


def stored_points(
    model: Decoder, machine: Machine, goal: Goal, points: Points, tier: str
) -> Points:
    """Return those points that have room in their tier for `goal.idle` waiting sessions per running one."""
    if tier == RECOMPUTE:
        return replace(points, tier=tier)
    c, part = points.candidates, machine.part
    each = request_bytes(model, c, goal.context, element_bytes(machine.kv))
    stored = goal.idle * each * c.batch * c.pp
    if tier == DEVICE:
        memory = points.memory + stored
        return replace(points, memory=memory, stored=stored).take(memory <= part.memory.value)
    room = part.host_memory if tier == HOST else part.disk
    return replace(points, stored=stored, tier=tier).take(stored <= (room.value if room else -1.0))


def placed(model: Decoder, machine: Machine, goal: Goal, points: Points, tier: str) -> Points:
    """Return aggregated points with their prefixes in a tier.

    A prefix comes before its prompt is computed, so the first token waits for it. While it comes, decodes go on; the
    link brings one per prompt, and holds the steps up only where it is slower than they are.
    """
    kept = stored_points(model, machine, goal, points, tier)
    c = kept.candidates
    fetch = fetching(model, machine, goal, c, tier)
    ttl = np.maximum(kept.ttl, fetch * c.batch * c.pp / goal.output)
    longer = (ttl - kept.ttl) * kept.causes.sum(axis=0) / kept.ttl  # seconds of a step
    causes = kept.causes.copy()
    causes[-1] += longer
    return replace(
        kept, ttl=ttl, ftl=kept.ftl + fetch, throughput=kept.throughput * kept.ttl / ttl, causes=causes,
        stall=kept.stall + longer,
    )  # fmt: skip


def parallel_tokens(prompt: int, generated: int) -> float:
    """Return MoE-Lens' PME: tokens computed at once per token of KV held over a request's life.

    ``2 (p + g) / ((2p + g) g)``. The closed form counts g terms of a sum that has g + 1.
    """
    return 2 * (prompt + generated) / ((2 * prompt + generated) * generated)


@dataclass(frozen=True, slots=True)
class Streaming:
    """Throughput of a model whose weights stream over the host link every step."""

    kv_tokens: float
    stream_seconds: float
    tokens_per_second: float
    bound: str


def streamed(
    model_bytes: float, kv_memory: float, kv_token_bytes: float, link: float, prompt: int, generated: int,
    gpu_tokens_per_second: float = float("inf"),
) -> Streaming:  # fmt: skip
    """Return ``min(PME M / delta, T_gpu)``. Source: MoE-Lens (arXiv 2504.09345) section 5.2."""
    held, delta = kv_memory / kv_token_bytes, model_bytes / link
    streaming = parallel_tokens(prompt, generated) * held / delta
    bound = "weight stream" if streaming <= gpu_tokens_per_second else "compute"
    return Streaming(held, delta, min(streaming, gpu_tokens_per_second), bound)


def fetch_seconds(
    tokens: float, kv_token_bytes: float, bandwidth: float, latency: float = 0.0
) -> float:
    """Return the seconds to bring a prefix from a tier."""
    return latency + tokens * kv_token_bytes / bandwidth


def cheaper(
    tokens: float,
    kv_token_bytes: float,
    bandwidth: float,
    prefill_seconds: float,
    latency: float = 0.0,
) -> str:
    """Return ``fetch`` or ``recompute`` for a prefix, whichever takes less time."""
    return (
        "fetch"
        if fetch_seconds(tokens, kv_token_bytes, bandwidth, latency) < prefill_seconds
        else "recompute"
    )


def hideable_bytes(step_seconds: float, bandwidth: float) -> float:
    """Return how many bytes a step can bring from a tier without growing."""
    return step_seconds * bandwidth
