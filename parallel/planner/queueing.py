"""Queueing, apart from the static model: a small event simulation of continuous batching.

The static model gives the unloaded time of a prompt and the time of a step. What a user waits for under load depends
on arrivals; it is simulated here, and labelled so. No closed form over concurrency predicts it: published tools miss
loaded first-token times by half and more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from ..errors import PlanError
from .columns import Array


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals: requests per second (Poisson), their prompts and answers, and how many are simulated."""

    rate: float
    prompt: int
    output: int
    requests: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.prompt < 1 or self.output < 1 or self.requests < 1:
            raise PlanError(
                "a load", "needs a rate and counts above zero", "use e.g. Load(2.0, 1024, 256)"
            )

    def arrivals(self) -> Array:
        """Return when requests come: a Poisson process."""
        gaps = np.random.default_rng(self.seed).exponential(1 / self.rate, self.requests)
        return np.cumsum(gaps)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the simulated requests saw, in seconds. Simulated, not measured."""

    first_token: Array
    per_token: Array
    busy: float

    def percentile(self, share: float) -> tuple[float, float]:
        """Return the first-token and per-token times that this share of requests does not exceed."""
        return float(np.quantile(self.first_token, share)), float(
            np.quantile(self.per_token, share)
        )


def simulate(
    load: Load, slots: int, step: Callable[[int, int], float], piece: int | None = None, arrivals: Array | None = None
) -> Seen:  # fmt: skip
    """Run one instance that decodes up to `slots` requests together and admits prompts first come, first served.

    Args:
        step: seconds of a step with so many decoding requests and so many tokens of a prompt.
        piece: tokens of a prompt that one step takes beside the decodes; None stops decoding for a whole prompt.
        arrivals: when requests come, in order; default at random, as the load says.
    """
    arrivals = load.arrivals() if arrivals is None else arrivals
    first, last = np.zeros(load.requests), np.zeros(load.requests)
    waiting: deque[int] = deque()
    done: list[
        tuple[int, int]
    ] = []  # heap of (step of the last token, request) of those that decode
    reading: tuple[int, int] | None = None  # request, prompt tokens left
    now, busy, seen, steps = 0.0, 0.0, 0, 0
    while seen < load.requests or waiting or done or reading:
        while seen < load.requests and arrivals[seen] <= now:
            waiting.append(seen)
            seen += 1
        if reading is None and waiting and len(done) < slots:
            reading = (waiting.popleft(), load.prompt)
        if reading is None and not done:
            now = float(arrivals[seen])
            continue
        part = min(piece or load.prompt, reading[1]) if reading else 0
        decoding = len(done) if reading is None or piece else 0
        took = step(decoding, part)
        now, busy = now + took, busy + took
        if decoding:
            steps += 1
            while done and done[0][0] == steps:
                last[heappop(done)[1]] = now
        if reading is not None:
            request, rest = reading
            reading = (request, rest - part) if rest > part else None
            if reading is None:
                first[request] = last[request] = now
                if load.output > 1:
                    heappush(done, (steps + load.output - 1, request))
    spread = (last - first) / max(1, load.output - 1)
    return Seen(first - arrivals, spread, busy / now)


def served(arrivals: Array, servers: int, service: float) -> Array:
    """Return when each request begins at one of some servers, first come, first served; each takes so many seconds."""
    free = [0.0] * servers
    begins = np.zeros(len(arrivals))
    for i, arrival in enumerate(arrivals):
        begins[i] = max(float(arrival), heappop(free))
        heappush(free, begins[i] + service)
    return begins
