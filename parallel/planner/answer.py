"""The answer: ranked plans for a goal, the frontier, the error band; and what would reach a goal out of reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import PlanError
from ..plan import Plan
from . import search
from .accuracy import PUBLISHED
from .candidates import one
from .catalogue import hardware
from .ffn_cost import Coverage
from .goals import MOST_RANKS, Goal
from .hardware import Hardware
from .loaded import Loaded
from .precision import element_bytes
from .proposals import Proposal, nearest, proposals
from .reading import decoder
from .shapes import Decoder
from .tiers import fetch_seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """What the planner found.

    Args:
        proposals: best first; where the goal is out of reach, the nearest that can be reached.
        reached: whether they meet the goal.
        remedies: what would reach a goal that is not.
        loaded: what users would wait for under arrivals, simulated; empty unless asked for (`loaded.under_load`).
    """

    model: str
    hardware: str
    goal: Goal
    proposals: tuple[Proposal, ...]
    frontier: tuple[Proposal, ...]
    reached: bool
    why: str = ""
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loaded: tuple[Loaded, ...] = ()

    @property
    def band(self) -> str:
        """The published error of the model."""
        return str(PUBLISHED)

    def to_json(self) -> str:
        """Write everything as JSON."""
        data: dict[str, Any] = asdict(self)
        data["error_band"] = asdict(PUBLISHED)
        for name, found in (("proposals", self.proposals), ("frontier", self.frontier)):
            for row, proposal in zip(data[name], found, strict=True):
                row["bottleneck"] = proposal.bottleneck
        return json.dumps(data, indent=2)


def answer(
    model: Any, part: str | Hardware, goal: Goal, most: int = 10, cover: Coverage | None = None
) -> Answer:
    """Find the best plans of a model on some hardware for a goal.

    Args:
        cover: which share of experts a number of tokens touches; default Zipf's (`ffn_cost.zipf`).

    Raises:
        PlanError: an unknown model, part or precision; a model that fits on no plan of these ranks.
    """
    known = decoder(model)
    chip = hardware(part) if isinstance(part, str) else part
    found = search.sweep(known, chip, goal, cover=cover)
    if not found:
        raise _too_small(known, chip, goal)
    meeting = [
        points for points in (search.within(points, goal) for points in found) if len(points)
    ]
    best = proposals(known, chip, goal, meeting, most)
    why, remedies = "", ()
    if not best:
        best = nearest(known, chip, goal, found)
        why, remedies = out_of_reach(goal, best[0]), remedy(known, chip, goal)
    edge = proposals(
        known, chip, goal, [search.envelope(points) for points in found], 10_000, frontier=True
    )
    notes = _notes(known, chip, goal, best[0])
    return Answer(known.name, chip.title, goal, best, edge, bool(meeting), why, remedies, notes)


def out_of_reach(goal: Goal, best: Proposal) -> str:
    """Say which of a goal's times the nearest plan misses, and what it reaches."""
    said = []
    if goal.ttl is not None and best.ttl > goal.ttl:
        said.append(
            f"{goal.ttl * 1e3:.3g} ms per token: the best reachable is {best.ttl * 1e3:.3g} ms"
        )
    if goal.ftl is not None and best.ftl > goal.ftl:
        said.append(f"{goal.ftl:.3g} s to the first token: the best reachable is {best.ftl:.3g} s")
    if goal.stall is not None and best.stall > goal.stall:
        said.append(
            f"{goal.stall * 1e3:.3g} ms between two tokens: the best reachable is {best.stall * 1e3:.3g} ms"
        )
    return "; ".join(said) or "no plan meets all times at once"


def remedy(model: Decoder, part: Hardware, goal: Goal) -> tuple[str, ...]:
    """Return the changes that, each alone, would reach the goal; of more ranks only the fewest."""
    found: list[str] = []
    for said, chip, other in _ways(part, goal):
        if said.startswith("--gpus") and any(way.startswith("--gpus") for way in found):
            continue
        if any(len(search.within(points, other)) for points in search.sweep(model, chip, other)):
            found.append(said)
    return tuple(found)


def _ways(part: Hardware, goal: Goal) -> Iterator[tuple[str, Hardware, Goal]]:
    """Changes worth trying, as they would be typed."""
    for times in (times for times in (2, 4, 8) if goal.ranks * times <= MOST_RANKS):
        yield f"--gpus {goal.ranks * times}", part, replace(goal, ranks=goal.ranks * times)
    for kv in ("fp8", "mxfp4"):
        if element_bytes(kv) < min(map(element_bytes, goal.kv)):
            yield f"--kv {kv}", part, replace(goal, kv=(kv,))
    for weight in ("fp8", "nvfp4"):
        if element_bytes(weight) < min(map(element_bytes, goal.weights)):
            yield f"--weights {weight}", part, replace(goal, weights=(weight,))
    if not goal.draft:
        yield (
            "--draft 3 (if 70 % of drafts are accepted)",
            part,
            replace(goal, draft=3, acceptance=0.7),
        )
    for shorter in (goal.context // 2, goal.context // 8):
        if shorter >= max(goal.prompt, 1):
            yield f"--context {shorter}", part, replace(goal, context=shorter)
    for name in ("b200", "gb200", "gb300"):
        if name != part.name:
            yield f"--hardware {name}", hardware(name), goal


def _too_small(model: Decoder, part: Hardware, goal: Goal) -> PlanError:
    weight, kv = (min(map(element_bytes, choices)) for choices in (goal.weights, goal.kv))
    weights, request = model.params * weight, model.kv_elements * goal.context * kv
    there = goal.ranks * part.memory.value
    ways = remedy(model, part, replace(goal, ttl=None, ftl=None))
    return PlanError(
        f"{model.name} on {goal.ranks} x {part.title}",
        f"does not fit by any plan: weights of {weights / 1e9:,.0f} GB and {request / 1e9:,.1f} GB of KV a request, "
        f"against {there / 1e9:,.0f} GB in all",
        f"any of these would do: {', '.join(ways)}"
        if ways
        else "use many more accelerators, or a smaller model",
    )


def _notes(model: Decoder, part: Hardware, goal: Goal, best: Proposal) -> tuple[str, ...]:
    """Say where a prefix of the whole context would better come from: a tier, or the prompt again."""
    kv = model.kv_elements * element_bytes(best.kv)
    plan = one(Plan.parse(best.plan))
    (machine,) = search.machines(part, replace(goal, **best.precisions))
    again = float(search.prefill(model, machine, plan, goal.context).total[0])
    holders = max(1, best.ranks // Plan.parse(best.plan).dp.size)
    host, far = (
        fetch_seconds(goal.context, kv / holders, link)
        for link in (part.host_link.value, part.scale_out.value)
    )
    better = "fetching" if min(host, far) < again else "computing"
    said = (
        f"a cached context of {goal.context:,} tokens comes back in {host:.2g} s from host memory, {far:.2g} s over "
        f"the network, {again:.2g} s by computing it again: {better} is faster"
    )
    return (said,)
