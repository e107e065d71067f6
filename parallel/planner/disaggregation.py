"""Disaggregation: prefill and decode (or attention and experts) on ranks of their own, at matching rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import candidates as enumeration
from .candidates import Candidates
from .goals import Goal
from .points import Partner, Points
from .search import decode_points, fits
from .serving import rate_match
from .shapes import Decoder
from .step_time import Machine, prefill
from .tiers import fetching, stored_points

PREFILL_DERATE, DECODE_DERATE = 0.9, 0.92  # aiconfigurator 0.12's practical shares of an ideal pool


@dataclass(frozen=True, slots=True)
class PrefillPool:
    """The best prefill instance within the time to first token."""

    candidates: Candidates
    ranks: int
    requests_per_second: float
    seconds: float


def prefill_pool(
    model: Decoder, machine: Machine, goal: Goal, tier: str = "device"
) -> PrefillPool | None:
    """Return the prefill plan with the most prompts per second and rank whose first token is in time.

    Cached prefixes come from their tier first; those on the device are the decode ranks', and come over the network.
    """
    plans = enumeration.grids(model, goal.ranks, helix=False, ring=True, whole=False)
    c = enumeration.crossed(plans, (1,))
    c = c.take(fits(model, machine, c, goal.context) <= machine.part.memory.value)
    if not len(c):
        return None
    fetch = fetching(model, machine, goal, c, tier, apart=True)
    seconds = prefill(model, machine, c, goal.prompt, goal.cached).total + fetch
    work = prefill(model, machine, c, goal.prompt, goal.cached, chunk=None).total / c.pp
    rate = PREFILL_DERATE * c.dp / np.maximum(work, fetch)
    allowed = np.ones(len(c), bool) if goal.ftl is None else seconds <= goal.ftl
    if not allowed.any():
        return None
    score = np.where(allowed, rate / c.ranks, -1.0)
    best = int(np.lexsort((c.ranks, -np.round(score, 9)))[0])
    return PrefillPool(
        c.take(np.array([best])), int(c.ranks[best]), float(rate[best]), float(seconds[best])
    )


def disaggregated_points(
    model: Decoder, machine: Machine, goal: Goal, tier: str = "device"
) -> Points:
    """Price decode pools beside the best prefill pool, in whole instances that fit on the ranks there are.

    For each decode row: the smallest whole numbers of instances whose request rates balance (`serving.rate_match`), as
    many times as the ranks allow. Throughput is what the slower side lets through.
    """
    alone = stored_points(
        model, machine, goal, decode_points(model, machine, goal, whole=False), tier
    )
    pool = prefill_pool(model, machine, goal, tier)
    if pool is None or not len(alone):
        return replace(alone.take(np.zeros(len(alone), bool)), mode="disaggregated", partner=())
    c = alone.candidates
    in_flight = c.batch * c.dp * c.pp
    rate = DECODE_DERATE * in_flight / alone.ttl / (goal.output - 1)
    throughput, used, partner = np.zeros(len(c)), np.zeros(len(c)), []
    text = str(pool.candidates.plan(0, model.shape))
    for row in _worth_matching(alone):
        matched = rate_match(pool.requests_per_second, pool.ranks, rate[row], int(c.ranks[row]))
        n_p, n_d = _within(
            matched.prefill, matched.decode, pool.ranks, int(c.ranks[row]), goal.ranks
        )
        if n_d:
            requests = min(n_p * pool.requests_per_second, n_d * rate[row])
            throughput[row] = requests * (goal.output - 1)
            used[row] = n_p * pool.ranks + n_d * c.ranks[row]
            said = f"{n_d} x this + {n_p} x prefill {text!r}"
            partner.append((row, Partner(said, text, n_p, n_d)))
    rows = np.array([row for row, _ in partner], dtype=int)
    made = replace(
        alone,
        mode="disaggregated",
        throughput=throughput,
        used=used,
        ftl=np.full(len(c), pool.seconds),
        partner=(),
    ).take(rows)
    return replace(made, partner=tuple(other for _, other in partner))


def _worth_matching(alone: Points) -> list[int]:
    """Rows that no row of the same or fewer ranks beats in both latency and throughput: matching is not vectorised."""
    kept: list[int] = []
    for ranks in np.unique(alone.candidates.ranks):
        rows = np.flatnonzero(alone.candidates.ranks == ranks)
        order = rows[np.lexsort((-alone.throughput[rows], alone.ttl[rows]))]
        best = np.maximum.accumulate(alone.throughput[order])
        ahead = np.concatenate(([True], alone.throughput[order][1:] > best[:-1]))
        kept += order[ahead].tolist()
    return kept


def _within(
    n_p: int, n_d: int, prefill_ranks: int, decode_ranks: int, most: int
) -> tuple[int, int]:
    """Repeat the matched numbers as often as they fit; where they do not fit once, divide what there is."""
    times = most // (n_p * prefill_ranks + n_d * decode_ranks)
    if times:
        return n_p * times, n_d * times
    share = n_p * prefill_ranks / (n_p * prefill_ranks + n_d * decode_ranks)
    p = max(1, round(share * most / prefill_ranks))
    d = (most - p * prefill_ranks) // decode_ranks
    return (p, d) if d > 0 else (0, 0)
