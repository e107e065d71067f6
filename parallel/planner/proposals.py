"""Proposals: points in words and numbers for a person, ranked, on the frontier, or nearest to a goal out of reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import search
from .goals import Goal
from .hardware import Hardware
from .points import Partner, Points
from .provenance import provenance
from .shapes import Decoder


@dataclass(frozen=True, slots=True)
class Proposal:
    """One plan with what it would do. ``plan`` pastes into `Plan.parse`; times are seconds, memory bytes.

    Args:
        ftl: seconds to the first token when nobody waits before it.
        stall: longest seconds between two tokens of a request, a prompt beside them included.
        prefill: how prompts pass, in words; `beside` tokens in `groups` groups of layers (0: alone).
        tier: where cached prefixes wait; `stored` bytes of a rank there.
        partner: the other side in words; of a prefill pool its plan, and how many instances there are of both.
    """

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
    comm: str = "bf16"
    prefill: str = ""
    stall: float = 0.0
    beside: int = 0
    groups: int = 1
    tier: str = "device"
    stored: float = 0.0
    partner: str = ""
    partner_plan: str = ""
    partner_instances: int = 0
    instances: int = 1

    @property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """The choices of a goal that leave only what this proposal uses."""
        return {"weights": (self.weights,), "kv": (self.kv,), "comm": (self.comm,)}

    @property
    def bottleneck(self) -> str:
        """The cause with the largest share of a step."""
        return max(self.split, key=lambda cause: self.split[cause])


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
    rows = _undominated(rows) if frontier else _useful(rows)
    return tuple(sorted(rows, key=lambda row: (-row.tokens_per_rank, row.ttl))[:most])


def _useful(rows: list[Proposal]) -> list[Proposal]:
    """Leave out what a narrower precision does no better: the choices come in the order they were given."""
    kept: dict[tuple[object, ...], Proposal] = {}
    for row in rows:
        same = (row.plan, row.mode, row.batch, row.draft, row.prefill, row.tier, round(row.ttl, 6))
        kept.setdefault((*same, round(row.tokens_per_rank, 2)), row)
    return list(kept.values())


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
    other = points.partner[row] if points.partner else Partner("")
    return Proposal(
        plan=str(plan), mode=points.mode, weights=points.weight, kv=points.kv,
        batch=int(points.candidates.batch[row]), draft=draft,
        ttl=float(points.ttl[row]), ftl=float(points.ftl[row]),
        tokens_per_user=float(points.per_user[row]), tokens_per_rank=float(points.per_rank[row]),
        memory=float(points.memory[row]), ranks=int(points.used[row]), split=points.split(row),
        provenance=provenance(part, plan, goal.context, draft, points.comm), comm=points.comm,
        prefill=_passing(points, row) if goal.prompt else "", stall=float(points.stall[row]),
        beside=int(points.candidates.beside[row]), groups=int(points.candidates.groups[row]),
        tier=points.tier, stored=float(points.stored[row]),
        partner=other.text, partner_plan=other.plan, partner_instances=other.instances, instances=other.here,
    )  # fmt: skip


def _passing(points: Points, row: int) -> str:
    """Say how prompts pass."""
    beside, groups = int(points.candidates.beside[row]), int(points.candidates.groups[row])
    if points.mode != "aggregated":
        return "elsewhere"
    if not beside:
        return "alone"
    return f"{groups} layer groups" if groups > 1 else f"chunks of {beside}"


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
        if goal.stall is not None:
            over += np.maximum(0, np.log(points.stall / goal.stall))
        best = int(np.lexsort((-points.per_rank, np.round(over, 9)))[0])
        rows.append((float(over[best]), proposal(model, part, goal, points, best)))
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))[:1]
