"""Points: candidates with what they would do, as columns; and the frontier among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .candidates import Candidates
from .columns import Array
from .step_time import CAUSES

Index = NDArray[np.intp]
# what a step is spent on: decoding by cause, and the prompts it carries
SHARES = (*CAUSES, "prompts")


@dataclass(frozen=True, slots=True)
class Partner:
    """The other side of a plan: in words; and of a prefill pool its plan and how many of both there are."""

    text: str
    plan: str = ""
    instances: int = 0
    here: int = 1


@dataclass(frozen=True, slots=True)
class Points:
    """Priced candidates of one mode, one choice of precisions, and one tier for cached prefixes.

    Args:
        comm: precision of what collectives move without adding it up.
        tier: where a request's cached prefix waits for its next prompt, or ``recompute``.
        ttl: seconds from token to token of one request.
        ftl: seconds to the first token, unloaded; 0 where prompts are computed elsewhere.
        throughput: output tokens per second of all ranks together.
        ranks: ranks the throughput is shared by: those that were asked for, idle ones included.
        memory: bytes of the fullest rank.
        causes: seconds of a step, ``[share, row]`` in the order of `SHARES`.
        stall: longest seconds between two tokens of a request: those of a step that also carries a prompt.
        stored: bytes of waiting prefixes of a rank in the tier.
        partner: the prefill (or FFN) side of each row, where there is one.
    """

    mode: str
    weight: str
    kv: str
    comm: str
    candidates: Candidates
    ttl: Array
    ftl: Array
    throughput: Array
    ranks: float
    used: Array
    memory: Array
    causes: Array
    stall: Array
    stored: Array
    tier: str = "device"
    partner: tuple[Partner, ...] = ()

    def __len__(self) -> int:
        return len(self.ttl)

    @property
    def per_user(self) -> Array:
        """Tokens per second of one request."""
        return 1 / self.ttl

    @property
    def per_rank(self) -> Array:
        """Tokens per second per rank."""
        return self.throughput / self.ranks

    def take(self, index: Index | NDArray[np.bool_]) -> Points:
        """Return some rows."""
        rows = np.arange(len(self))[index]
        return Points(
            self.mode, self.weight, self.kv, self.comm, self.candidates.take(rows), self.ttl[rows], self.ftl[rows],
            self.throughput[rows], self.ranks, self.used[rows], self.memory[rows], self.causes[:, rows],
            self.stall[rows], self.stored[rows], self.tier,
            tuple(self.partner[i] for i in rows) if self.partner else (),
        )  # fmt: skip

    def and_those(self, other: Points) -> Points:
        """Return these rows and those of other points that differ in nothing but rows."""
        both = {
            name: np.concatenate((getattr(self, name), getattr(other, name)), axis=-1)
            for name in ("ttl", "ftl", "throughput", "used", "memory", "causes", "stall", "stored")
        }
        rows = self.candidates.and_those(other.candidates)
        return replace(self, candidates=rows, partner=self.partner + other.partner, **both)

    def split(self, row: int) -> dict[str, float]:
        """Return the share of a step by cause."""
        whole = float(self.causes[:, row].sum()) or 1.0
        return {cause: float(self.causes[i, row]) / whole for i, cause in enumerate(SHARES)}


def frontier(per_user: Array, per_rank: Array) -> Index:
    """Return the rows that no other row beats in both, from the fastest user to the most throughput."""
    order = np.lexsort((-per_rank, -per_user))
    best = np.maximum.accumulate(per_rank[order])
    ahead = np.concatenate(([True], per_rank[order][1:] > best[:-1]))
    return order[ahead]
