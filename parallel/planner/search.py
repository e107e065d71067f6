"""The sweep: price every legal plan at every batch, keep what fits, and find the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from ..errors import PlanError
from . import candidates as enumeration
from .candidates import Candidates
from .columns import Array, as_array
from .efficiency import Efficiency, fitted
from .ffn_cost import Coverage
from .goals import Goal
from .hardware import Hardware
from .memory import rank_bytes
from .mixed import first_token, mixed_steps
from .points import Index, Points, frontier
from .precision import element_bytes
from .serving import accepted_tokens
from .shapes import Decoder
from .step_time import CAUSES, Machine, Split, decode_step, prefill
from .tiers import RECOMPUTE, placed, recomputed, tiers_of

QUARTERS = (4, 5, 6, 7)  # of each power of two: no two neighbours are more than a quarter apart
BATCHES = tuple(
    sorted({2**n * q // 4 for n in range(12) for q in QUARTERS if 2**n * q % 4 == 0} | {4096})
)
CHUNKS = (1, 2, 4, 8)
DRAFT_HEAD = 1.0  # a drafted token costs about one layer of the model (a multi-token head)


def machines(
    part: Hardware,
    goal: Goal,
    constants: Efficiency | None = None,
    cover: Coverage | None = None,
) -> list[Machine]:
    """Return one machine per choice of precisions to search."""
    constants = constants or fitted(part)
    return [
        Machine(part, constants, weight, kv, wire=comm, cover=cover)
        for weight, kv, comm in product(goal.weights, goal.kv, goal.comm)
    ]


def fits(model: Decoder, machine: Machine, c: Candidates, context: int) -> Array:
    """Return the bytes of the fullest rank."""
    return rank_bytes(
        model,
        c,
        context,
        element_bytes(machine.weight),
        element_bytes(machine.kv),
        machine.constants.memory_floor,
    )


def decode_points(model: Decoder, machine: Machine, goal: Goal, whole: bool = True) -> Points:
    """Price decoding alone: prompts are computed elsewhere or cached. Only what fits is returned."""
    c, memory = fitting(model, machine, goal, whole)
    step = decode_step(model, machine, c, goal.context)
    return points_of(goal, machine, c, memory, step, "decode", _drafting(model, c))


def fitting(
    model: Decoder, machine: Machine, goal: Goal, whole: bool = True
) -> tuple[Candidates, Array]:
    """Return every candidate that fits into memory, and its bytes."""
    plans = enumeration.grids(model, goal.ranks, helix=goal.helix, whole=whole)
    closed = [i for i, axis in enumerate(enumeration.COLUMNS) if axis not in goal.axes]
    plans = plans[np.all(plans[:, closed] == 1, axis=1)]
    c = enumeration.crossed(plans, BATCHES, CHUNKS if goal.helix else (1,), goal.drafts)
    memory = fits(model, machine, c, goal.context)
    inside = memory <= machine.part.memory.value
    return c.take(inside), memory[inside]


def _drafting(model: Decoder, c: Candidates) -> Array:
    """How much longer a step is for making its drafts."""
    return 1 + c.draft * DRAFT_HEAD / model.layers


def points_of(
    goal: Goal, machine: Machine, c: Candidates, memory: Array, step: Split, mode: str, longer: Array,
    prompts: Array | float = 0.0, ftl: Array | None = None, stall: Array | None = None,
) -> Points:  # fmt: skip
    """Turn seconds of a step into points; `prompts` are seconds of prefill that each token carries."""
    accepted = accepted_of(goal, c)
    seconds = [getattr(step, cause) * longer for cause in CAUSES] + [prompts * accepted]
    causes = np.stack([np.broadcast_to(column, len(c)) for column in seconds])
    ttl = causes.sum(axis=0) / accepted
    nothing = np.zeros(len(c))
    return Points(
        mode, machine.weight, machine.kv, machine.comm, c, ttl,
        nothing if ftl is None else ftl, c.batch * c.dp * c.pp / ttl, float(goal.ranks), c.ranks, memory, causes,
        ttl * accepted if stall is None else stall, nothing,
    )  # fmt: skip


def accepted_of(goal: Goal, c: Candidates) -> Array:
    """Return the tokens that a step yields for a request."""
    table = as_array([accepted_tokens(n, goal.acceptance) for n in range(goal.draft + 1)])
    return table[c.draft.astype(int)]


def aggregated_points(model: Decoder, machine: Machine, goal: Goal) -> Points:
    """Price decode and prefill on the same ranks: prompts whole and alone, or beside the decodes (`mixed`).

    Alone is the fluid limit: each step admits batch/output prompts.
    """
    c, memory = fitting(model, machine, goal)
    if not len(c):
        return points_of(goal, machine, c, memory, Split(), "aggregated", np.ones(0))
    single = c.take((c.batch == 1) & (c.chunks == 1) & (c.draft == 0))
    place = _same_plan(c, single)
    first = prefill(model, machine, single, goal.prompt, goal.cached).total[place]
    work = prefill(model, machine, single, goal.prompt, goal.cached, chunk=None).total[place]
    step = decode_step(model, machine, c, goal.context)
    longer = _drafting(model, c)
    alone = points_of(
        goal, machine, c, memory, step, "aggregated", longer, c.batch / goal.output * work, first,
        step.total * longer + first,
    )  # fmt: skip
    return alone.and_those(_beside(model, machine, goal, c, step))


def _beside(model: Decoder, machine: Machine, goal: Goal, c: Candidates, step: Split) -> Points:
    """Price prompts beside the decodes, where the batch's prompts come no faster than the steps that carry them."""
    mixed = mixed_steps(model, machine, goal, c, step.total)
    made, pure = mixed.candidates, step.rows(mixed.rows, len(c))
    memory = fits(model, machine, made, goal.context)
    longer = _drafting(model, made)
    share = made.batch / goal.output * mixed.parts  # steps with a part of a prompt, for each token
    points = points_of(
        goal, machine, made, memory, pure, "aggregated", longer, share * (mixed.step - pure.total),
        first_token(mixed), mixed.step * longer,
    )  # fmt: skip
    bearable = share * accepted_of(goal, made) <= 1
    return points.take(bearable & (memory <= machine.part.memory.value))


def _same_plan(c: Candidates, single: Candidates) -> Index:
    """Return for each row the place of its plan among `single`, which has every plan of `c` once."""
    columns = [np.stack([t.tp, t.kvp, t.cp, t.dp, t.pp, t.ep, t.etp], axis=1) for t in (c, single)]
    _, where = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    place = np.empty(where.max() + 1, dtype=int)
    place[where[len(c) :]] = np.arange(len(single))
    return place[where[: len(c)]]


def within(points: Points, goal: Goal) -> Points:
    """Keep the points that meet the goal's times."""
    keep = np.ones(len(points), bool)
    if goal.ttl is not None:
        keep &= points.ttl <= goal.ttl
    if goal.ftl is not None and goal.prompt:
        keep &= points.ftl <= goal.ftl
    if goal.stall is not None:
        keep &= points.stall <= goal.stall
    return points.take(keep)


def ranked(points: Points, most: int = 10) -> Points:
    """Return the best row of each plan, most throughput first; ties go to fewer ranks, then to less latency.

    Of several folds of the experts that cost the same, the one with the least etp stands for all.
    """
    c = points.candidates
    order = np.lexsort((c.etp, c.chunks, points.ttl, points.used, -np.round(points.per_rank, 6)))
    grid = [c.tp, c.kvp, c.cp, c.dp, c.pp]
    order = order[_firsts(np.stack([*grid, c.ep, c.etp])[:, order])]
    order = order[_firsts(np.stack([*grid, np.round(points.ttl, 9)])[:, order])]
    return points.take(order[:most])


def _firsts(columns: Array) -> Index:
    """Return where each different column comes first, in order."""
    _, first = np.unique(columns, axis=1, return_index=True)
    return np.sort(first)


def envelope(points: Points) -> Points:
    """Return the Pareto frontier of tokens/s/user against tokens/s/rank."""
    return points.take(frontier(points.per_user, points.per_rank))


def priced(model: Decoder, machine: Machine, goal: Goal, rows: Candidates) -> Points:
    """Price given rows whether they fit or not.

    Raises:
        PlanError: a row that needs more ranks than there are.
    """
    if np.any(rows.ranks > goal.ranks):
        most = int(rows.ranks.max())
        raise PlanError(
            f"a plan of {most} ranks",
            f"needs more than the {goal.ranks} there are",
            f"use --gpus {most}",
        )
    memory = fits(model, machine, rows, goal.context)
    step = decode_step(model, machine, rows, goal.context)
    return points_of(goal, machine, rows, memory, step, "decode", _drafting(model, rows))


def without_helix(goal: Goal) -> Goal:
    """Return the same goal with kvp left out."""
    return replace(goal, helix=False)


def sweep(
    model: Decoder, part: Hardware, goal: Goal, constants: Efficiency | None = None, cover: Coverage | None = None
) -> Sequence[Points]:  # fmt: skip
    """Price every mode that the goal admits, for every choice of precisions and every tier.

    Without prompts: decode, and for models with experts also attention apart from them. With prompts: prefill on the
    same ranks (aggregated) and on ranks of its own (disaggregated).
    """
    from .attention_ffn import split_points
    from .disaggregation import disaggregated_points

    found: list[Points] = []
    for machine in machines(part, goal, constants, cover):
        if not goal.prompt:
            found.append(decode_points(model, machine, goal))
            if model.has_experts and goal.split and goal.ranks > 1:
                found.append(split_points(model, machine, goal))
            continue
        whole = (
            aggregated_points(model, machine, goal) if set(tiers_of(goal)) - {RECOMPUTE} else None
        )
        for tier in tiers_of(goal):
            wish = recomputed(goal) if tier == RECOMPUTE else goal
            same = aggregated_points(model, machine, wish) if tier == RECOMPUTE else whole
            assert same is not None
            found.append(placed(model, machine, wish, same, tier))
            found.append(disaggregated_points(model, machine, wish, tier))
    return [points for points in found if len(points)]
