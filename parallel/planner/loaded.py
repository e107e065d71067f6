"""Loaded: what users of a proposed plan would wait for when requests arrive at random; simulated, not closed-form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from ..plan import Plan
from . import search
from .candidates import Candidates, one
from .columns import as_array
from .disaggregation import DECODE_DERATE, PREFILL_DERATE
from .ffn_cost import Coverage
from .goals import Goal
from .hardware import Hardware
from .mixed import mixed_steps
from .proposals import Proposal
from .queueing import Load, Seen, served, simulate
from .serving import accepted_tokens
from .shapes import Decoder
from .step_time import Machine, decode_step, prefill
from .tiers import RECOMPUTE, fetching, recomputed

FILLS, LEAST, MOST = 6, 400, 2000  # requests simulated: so many times the slots, within bounds


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one plan's users see under arrivals, in seconds; `unloaded` is the first token of a lone request.

    Args:
        rate: requests per second that arrive; `capacity` is the most the plan carries for long.
        first_token, per_token: medians; `first_token_p99`, `per_token_p99` what 99 of 100 do not exceed.
        busy: share of the time in which steps run.
        requests: how many were simulated, of one dp rank.
    """

    plan: str
    mode: str
    rate: float
    capacity: float
    unloaded: float
    first_token: float
    first_token_p99: float
    per_token: float
    per_token_p99: float
    busy: float
    requests: int

    @property
    def overloaded(self) -> bool:
        """Whether more arrives than the plan carries: waits then grow for as long as it lasts."""
        return self.rate >= self.capacity


def under_load(
    model: Decoder,
    part: Hardware,
    goal: Goal,
    row: Proposal,
    rate: float,
    seed: int = 0,
    cover: Coverage | None = None,
) -> Loaded:
    """Simulate Poisson arrivals of `rate` requests per second over all instances of a proposal."""
    wish = recomputed(goal) if row.tier == RECOMPUTE else goal
    (machine,) = search.machines(part, replace(wish, **row.precisions), cover=cover)
    plan, accepted = Plan.parse(row.plan), accepted_tokens(row.draft, goal.acceptance)
    instances = row.instances * plan.dp.size
    slots = row.batch * plan.pp.size
    requests = min(MOST, max(LEAST, FILLS * slots))
    load = Load(rate / instances, wish.prompt, ceil(goal.output / accepted), requests, seed)
    if row.mode == "aggregated":
        fetch = float(fetching(model, machine, wish, one(plan), row.tier)[0])
        seen = _together(model, machine, wish, row, load)
        first = seen.first_token + fetch
        lone = _together(model, machine, wish, row, replace(load, requests=1))
        unloaded = float(lone.first_token[0]) + fetch
    else:
        seen, first = _apart(model, machine, wish, row, load, instances)
        unloaded = row.ftl
    p50, p99 = np.quantile(first, (0.5, 0.99))
    t50, t99 = np.quantile(seen.per_token, (0.5, 0.99)) / accepted
    capacity = row.tokens_per_rank * goal.ranks / goal.output
    return Loaded(
        row.plan, row.mode, rate, capacity, unloaded, float(p50), float(p99), float(t50), float(t99), seen.busy,
        requests,
    )  # fmt: skip


def _together(model: Decoder, machine: Machine, goal: Goal, row: Proposal, load: Load) -> Seen:
    """Prompts and decodes on the same ranks, as the proposal passes them."""
    c, stages = one(Plan.parse(row.plan), row.batch, row.draft), Plan.parse(row.plan).pp.size
    pure = _steps(lambda b: _pure(model, machine, goal, _with_batch(c, b)), row, stages)
    if not row.beside:
        work = prefill(model, machine, c, goal.prompt, goal.cached, chunk=None).total[0] / stages
        return simulate(load, row.batch * stages, lambda n, p: float(work) if p else pure(n))
    parts = ceil(goal.prompt / row.beside) * row.groups
    mixed = _steps(lambda b: _mixed(model, machine, goal, _with_batch(c, b), row), row, stages)

    def step(decoding: int, tokens: int) -> float:
        alone = pure(decoding)
        return alone + (mixed(decoding) - alone) / stages if tokens else alone

    return simulate(load, row.batch * stages, step, ceil(goal.prompt / parts))


def _apart(
    model: Decoder, machine: Machine, goal: Goal, row: Proposal, load: Load, instances: int
) -> tuple[Seen, np.ndarray]:
    """Prompts on a pool of their own, then decodes: what the first pool finishes arrives at the second."""
    there = Plan.parse(row.partner_plan)
    c, pool = one(Plan.parse(row.plan), row.batch, row.draft), one(there)
    fetch = float(fetching(model, machine, goal, pool, row.tier, apart=True)[0])
    work = prefill(model, machine, pool, goal.prompt, goal.cached, chunk=None).total[0]
    service = max(float(work) / there.pp.size, fetch) / PREFILL_DERATE
    every = Load(
        load.rate * instances, load.prompt, load.output, load.requests * instances, load.seed
    )
    arrivals = every.arrivals()
    first = served(arrivals, row.partner_instances * there.dp.size, service) + row.ftl
    stages = Plan.parse(row.plan).pp.size
    pure = _steps(lambda b: _pure(model, machine, goal, _with_batch(c, b)), row, stages)
    ones = np.sort(first)[::instances][: load.requests]
    seen = simulate(
        load, row.batch * stages, lambda n, p: pure(n) / DECODE_DERATE if n else 0.0, load.prompt, ones
    )  # fmt: skip
    return seen, first - arrivals


def _with_batch(c: Candidates, batches: np.ndarray) -> Candidates:
    return replace(c.take(np.zeros(len(batches), dtype=int)), batch=batches)


def _steps(
    price: Callable[[np.ndarray], np.ndarray], row: Proposal, stages: int
) -> Callable[[int], float]:
    """Price some batch sizes and interpolate between them; of pp stages each has its share of the requests."""
    batches = as_array(np.unique(np.round(np.geomspace(1, max(row.batch, 1), 12))))
    seconds = price(batches)
    table = [float(np.interp(n / stages, batches, seconds)) for n in range(row.batch * stages + 1)]
    return lambda n: table[n]


def _pure(model: Decoder, machine: Machine, goal: Goal, c: Candidates) -> np.ndarray:
    return decode_step(model, machine, c, goal.context).total * (
        1 + c.draft * search.DRAFT_HEAD / model.layers
    )


def _mixed(
    model: Decoder, machine: Machine, goal: Goal, c: Candidates, row: Proposal
) -> np.ndarray:
    pure = decode_step(model, machine, c, goal.context).total
    return mixed_steps(model, machine, goal, c, pure, [(row.beside, row.groups)]).step
