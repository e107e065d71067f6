"""The answer: ranked plans for a goal, the frontier, the error band; and what would reach a goal out of reach."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import PlanError
from ..legality import validate
from ..plan import Plan
from . import search
from .accuracy import PUBLISHED
from .candidates import grids, one
from .catalogue import hardware
from .goals import Goal
from .hardware import Hardware
from .points import Points
from .precision import element_bytes
from .provenance import provenance
from .reading import decoder
from .shapes import Decoder
from .tiers import fetch_seconds


@dataclass(frozen=True, slots=True)
class Proposal:
    """One plan with what it would do. ``plan`` pastes into `Plan.parse`."""

    plan: str
    mode: str
    weights: str
    kv: str
    batch: int
    draft: int
    ttl: float
    ftl: float
    tokens_per_user: float
    tokens_per_rank: float
    memory: float
    ranks: int
    split: dict[str, float]
    provenance: str
    partner: str = ""

    @property
    def bottleneck(self) -> str:
        """The cause with the largest share of a step."""
        return max(self.split, key=lambda cause: self.split[cause])


@dataclass(frozen=True, slots=True)
class Answer:
    """What the planner found.

    Args:
        proposals: best first; where the goal is out of reach, the nearest that can be reached.
        reached: whether they meet the goal.
        remedies: what would reach a goal that is not.
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

    @property
    def band(self) -> str:
        """The published error of the model."""
        return str(PUBLISHED)

    def to_json(self) -> str:
        """Write everything as JSON."""
        data: dict[str, Any] = asdict(self)
        data["error_band"] = asdict(PUBLISHED)
        for rows in (data["proposals"], data["frontier"]):
            for row in rows:
                row["bottleneck"] = max(row["split"], key=row["split"].get)
        return json.dumps(data, indent=2)


def answer(model: Any, part: str | Hardware, goal: Goal, most: int = 10) -> Answer:
    """Find the best plans of a model on some hardware for a goal.

    Raises:
        PlanError: an unknown model, part or precision; a model that fits on no plan of these ranks.
    """
    known = decoder(model)
    chip = hardware(part) if isinstance(part, str) else part
    found = search.sweep(known, chip, goal)
    if not found:
        raise _too_small(known, chip, goal)
    meeting = [
        points for points in (search.within(points, goal) for points in found) if len(points)
    ]
    best = proposals(known, chip, goal, meeting, most)
    why, remedies = "", ()
    if not best:
        best = nearest(known, chip, goal, found)
        why, remedies = _why(goal, best[0]), remedy(known, chip, goal)
    edge = proposals(
        known, chip, goal, [search.envelope(points) for points in found], 10_000, frontier=True
    )
    notes = _notes(known, chip, goal, best[0])
    return Answer(known.name, chip.title, goal, best, edge, bool(meeting), why, remedies, notes)


def proposals(
    model: Decoder,
    part: Hardware,
    goal: Goal,
    found: Sequence[Points],
    most: int,
    frontier: bool = False,
) -> tuple[Proposal, ...]:
    """Turn points of all modes and precisions into one list, most throughput per rank first."""
    rows = []
    for points in found:
        kept = points if frontier else search.ranked(points, most)
        rows += [proposal(model, part, goal, kept, row) for row in range(len(kept))]
    if frontier:
        rows = _undominated(rows)
    return tuple(sorted(rows, key=lambda row: (-row.tokens_per_rank, row.ttl))[:most])


def _undominated(rows: list[Proposal]) -> list[Proposal]:
    kept: list[Proposal] = []
    for row in sorted(rows, key=lambda row: (row.ttl, -row.tokens_per_rank)):
        if not kept or row.tokens_per_rank > kept[-1].tokens_per_rank:
            kept.append(row)
    return kept


def proposal(model: Decoder, part: Hardware, goal: Goal, points: Points, row: int) -> Proposal:
    """Describe one row, after the Plan's own legality has accepted it."""
    plan = points.candidates.plan(row, model.shape)
    plan.validate(model.shape)
    draft = int(points.candidates.draft[row])
    return Proposal(
        plan=str(plan), mode=points.mode, weights=points.weight, kv=points.kv,
        batch=int(points.candidates.batch[row]), draft=draft,
        ttl=float(points.ttl[row]), ftl=float(points.ftl[row]),
        tokens_per_user=float(points.per_user[row]), tokens_per_rank=float(points.per_rank[row]),
        memory=float(points.memory[row]), ranks=int(points.used[row]), split=points.split(row),
        provenance=provenance(part, plan, goal.context, draft),
        partner=points.partner[row] if points.partner else "",
    )  # fmt: skip


def nearest(
    model: Decoder, part: Hardware, goal: Goal, found: Sequence[Points]
) -> tuple[Proposal, ...]:
    """Return the least latency there is, for a goal that nothing meets."""
    rows = []
    for points in found:
        over = np.zeros(len(points))
        if goal.ttl is not None:
            over += np.maximum(0, np.log(points.ttl / goal.ttl))
        if goal.ftl is not None and goal.prompt:
            over += np.maximum(0, np.log(np.maximum(points.ftl, 1e-9) / goal.ftl))
        best = int(np.lexsort((-points.per_rank, np.round(over, 9)))[0])
        rows.append((float(over[best]), proposal(model, part, goal, points, best)))
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))[:1]


def _why(goal: Goal, best: Proposal) -> str:
    said = []
    if goal.ttl is not None and best.ttl > goal.ttl:
        said.append(
            f"{goal.ttl * 1e3:.3g} ms per token: the best reachable is {best.ttl * 1e3:.3g} ms"
        )
    if goal.ftl is not None and best.ftl > goal.ftl:
        said.append(f"{goal.ftl:.3g} s to the first token: the best reachable is {best.ftl:.3g} s")
    return "; ".join(said) or "no plan meets both times at once"


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
    for times in (2, 4, 8):
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
    (machine,) = search.machines(part, replace(goal, weights=(best.weights,), kv=(best.kv,)))
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


def check(model: Any, part: str | Hardware, goal: Goal, plan: Plan, batch: int = 1) -> Answer:
    """Price one plan that is given.

    Raises:
        PlanError: the plan is illegal, too large, or does not fit; with the nearest plan that is and does.
    """
    known, chip = decoder(model), hardware(part) if isinstance(part, str) else part
    (machine, *_) = search.machines(chip, goal)
    try:
        validate(plan, known.shape)
    except PlanError as error:
        near = nearest_plan(known, plan, goal.ranks)
        raise PlanError(
            error.asked, error.because, f"{error.instead}; the nearest legal plan is '{near}'"
        ) from None
    points = search.priced(known, machine, goal, one(plan, batch))
    if points.memory[0] > chip.memory.value:
        near = _nearest_fitting(known, machine, goal, plan)
        raise PlanError(
            f"plan '{plan}' with batch {batch}",
            f"needs {points.memory[0] / 1e9:,.0f} GB a rank and {chip.title} has {chip.memory.value / 1e9:,.0f}",
            f"the nearest plan that fits is '{near}'" if near else "nothing fits on so many ranks",
        )
    rows = (proposal(known, chip, goal, points, 0),)
    met = bool(len(search.within(points, goal)))
    return Answer(known.name, chip.title, goal, rows, rows, met, "" if met else _why(goal, rows[0]))


def _distance(plan: Plan, rows: Any) -> Any:
    sizes = [
        plan.tp.size,
        plan.kvp.size,
        plan.size("cp") // plan.kvp.size,
        plan.dp.size,
        plan.pp.size,
        plan.ep,
        plan.etp,
    ]
    return np.abs(np.log2(rows) - np.log2(np.array(sizes, float))).sum(axis=1)


def nearest_plan(model: Decoder, plan: Plan, ranks: int) -> Plan:
    """Return the legal plan of at most so many ranks whose axes differ least, in powers of two."""
    most = min(plan.world_size, ranks)
    rows = np.concatenate([grids(model, most), grids(model, most, whole=False)])
    best = rows[_distance(plan, rows).argmin()]
    return search.enumeration.crossed(best[None], (1,)).plan(0, model.shape)


def _nearest_fitting(model: Decoder, machine: Any, goal: Goal, plan: Plan) -> Plan | None:
    points = search.decode_points(model, machine, goal)
    if not len(points):
        return None
    c = points.candidates
    rows = np.stack([c.tp, c.kvp, c.cp, c.dp, c.pp, c.ep, c.etp], axis=1)
    return c.plan(int(_distance(plan, rows).argmin()), model.shape)
