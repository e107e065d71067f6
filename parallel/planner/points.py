"""Points: candidates with what they would do, as columns; and the frontier among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .candidates import Candidates
from .columns import Array
from .step_time import CAUSES

Index = NDArray[np.intp]
SHARES = (
    *CAUSES,
    "prompts",
)  # what a step is spent on: decoding by cause, and the prompts it carries


@dataclass(frozen=True, slots=True)
class Points:
    """Priced candidates of one mode, one weight and one KV precision.

    Args:
        ttl: seconds from token to token of one request.
        ftl: seconds to the first token, unloaded; 0 where prompts are computed elsewhere.
        throughput: output tokens per second of all ranks together.
        ranks: ranks the throughput is shared by: those that were asked for, idle ones included.
        memory: bytes of the fullest rank.
        causes: seconds of a step, ``[share, row]`` in the order of `SHARES`.
        partner: text of the prefill (or FFN) side, where there is one.
    """

    mode: str
    weight: str
    kv: str
    candidates: Candidates
    ttl: Array
    ftl: Array
    throughput: Array
    ranks: float
    used: Array
    memory: Array
    causes: Array
    partner: tuple[str, ...] = ()

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
            self.mode, self.weight, self.kv, self.candidates.take(rows), self.ttl[rows], self.ftl[rows],
            self.throughput[rows], self.ranks, self.used[rows], self.memory[rows], self.causes[:, rows],
            tuple(self.partner[i] for i in rows) if self.partner else (),
        )  # fmt: skip

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
