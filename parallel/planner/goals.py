"""Goals: what is asked of the hardware, and the precisions that may be used to reach it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import PlanError, unknown
from .precision import element_bytes

TIERS = ("device", "host", "disk", "recompute")  # where a cached prefix waits, or that it does not
MOST_RANKS = 2048  # more are dp copies of fewer; a sweep of so many takes seconds and gigabytes
SCALES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a user wants of so many ranks.

    Args:
        ranks: accelerators there are.
        context: tokens in the cache of each request while it decodes.
        ttl: most seconds from token to token; None asks for the most throughput at any latency.
        ftl: most seconds to the first token, unloaded; only where prompts are computed here.
        prompt: new tokens of each request; 0 means another pool (or a cache) brings them: decode alone.
        output: tokens each request generates.
        weights, kv: precisions to choose from; `comm` those of payloads that are moved and not added up.
        stall: most seconds between two tokens of a request, a prompt beside them included.
        idle: sessions that wait for their next prompt, for each that runs; `tiers` where their cache may wait.
        helix: whether kvp is searched; `split` whether attention and experts may have ranks of their own.
        axes: those that may have more than one rank.
        draft: most tokens drafted per step, each accepted with chance `acceptance`; 0 is no speculation.
    """

    ranks: int
    context: int
    ttl: float | None = None
    ftl: float | None = None
    prompt: int = 0
    output: int = 1024
    weights: tuple[str, ...] = ("fp8",)
    kv: tuple[str, ...] = ("bf16",)
    comm: tuple[str, ...] = ("bf16",)
    stall: float | None = None
    idle: int = 0
    tiers: tuple[str, ...] = TIERS
    draft: int = 0
    acceptance: float = 0.7
    helix: bool = True
    split: bool = False
    axes: tuple[str, ...] = ("tp", "kvp", "cp", "dp", "pp", "ep", "etp")

    def __post_init__(self) -> None:
        for name in ("ranks", "context", "output"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"{name}={getattr(self, name)}", "is not positive", f"use {name} >= 1"
                )
        if self.ranks > MOST_RANKS:
            raise PlanError(
                f"ranks={self.ranks}", f"is more than the {MOST_RANKS} that are searched",
                f"plan for {MOST_RANKS} or fewer and run copies",
            )  # fmt: skip
        if min(self.prompt, self.draft, self.idle) < 0:
            raise PlanError(
                "a negative count", "cannot be", "use prompt, draft and idle of 0 or more"
            )
        for name in ("ttl", "ftl", "stall"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise PlanError(f"{name}={value}", "is no time", f"use e.g. {name}=0.02 (seconds)")
        if not 0 <= self.acceptance <= 1:
            raise PlanError(
                f"acceptance={self.acceptance}", "is no chance", "use 0 <= acceptance <= 1"
            )
        if self.output < 2 and self.prompt:
            raise PlanError("output=1", "has no token after the first", "use output >= 2")
        for precision in (*self.weights, *self.kv):
            element_bytes(precision)
        self._check_choices()

    def _check_choices(self) -> None:
        for precision in self.comm:
            if not 1 <= element_bytes(precision) <= 2:
                raise PlanError(
                    f"comm={precision}", "is not how payloads are sent", "use bf16 or fp8"
                )
        for tier in self.tiers:
            if tier not in TIERS:
                raise unknown("tier", tier, TIERS)
        for name in ("weights", "kv", "comm", "tiers"):
            if not getattr(self, name):
                raise PlanError(f"no {name}", "leaves nothing to choose from", "name at least one")
        if self.idle and not self.cached:
            raise PlanError(
                f"idle={self.idle} without a cached prefix", "keeps nothing for a next prompt",
                "give a prompt, and a context that is longer",
            )  # fmt: skip

    @property
    def cached(self) -> int:
        """Tokens of a request that are cached before its prompt comes."""
        return max(0, self.context - self.prompt) if self.prompt else 0

    @property
    def drafts(self) -> tuple[int, ...]:
        """Draft lengths to search."""
        return tuple(n for n in (0, 1, 2, 3, 5, 7) if n < self.draft) + (
            (self.draft,) if self.draft else (0,)
        )


def seconds_of(text: str) -> float:
    """Read a time: ``20ms``, ``1.5s``, ``800us``.

    >>> seconds_of("20ms"), seconds_of("2s")
    (0.02, 2.0)
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(us|ms|s|m)", text.strip().lower())
    if found is None or float(found.group(1)) == 0:
        raise PlanError(f"time {text!r}", "is no time with a unit", "use e.g. 20ms or 1.5s")
    return float(found.group(1)) * SCALES[found.group(2)]


def rate_of(text: str) -> float:
    """Read a rate of requests: ``2/s``, ``90/m``.

    >>> rate_of("2/s"), rate_of("90/m")
    (2.0, 1.5)
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*/\s*(s|m)", text.strip().lower())
    if found is None or float(found.group(1)) == 0:
        raise PlanError(
            f"arrivals {text!r}", "is no rate of requests", "use e.g. 2/s, or 90/m for a minute"
        )
    return float(found.group(1)) / SCALES[found.group(2)]
