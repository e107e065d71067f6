"""Queueing, apart from the static model: a small event simulation of continuous batching.

The static model gives the unloaded time of a prompt and the time of a step. What a user waits for under load depends
on arrivals; it is simulated here, and labelled so. No closed form over concurrency predicts it: published tools miss
loaded first-token times by half and more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Loaded:
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
    load: Load,
    slots: int,
    step: Callable[[int], float],
    prefill: Callable[[int], float],
    chunk: int | None = None,
) -> Loaded:
    """Run one instance that decodes up to `slots` requests together and admits prompts first come, first served.

    Args:
        step: seconds of a decode step with so many requests.
        prefill: seconds of so many prompt tokens.
        chunk: tokens of a prompt that one step takes beside the decodes; None stops decoding for a whole prompt.
    """
    arrivals = np.cumsum(np.random.default_rng(load.seed).exponential(1 / load.rate, load.requests))
    first, last = np.zeros(load.requests), np.zeros(load.requests)
    waiting: deque[int] = deque()
    left: dict[int, int] = {}  # request -> tokens still to come
    reading: tuple[int, int] | None = None  # request, prompt tokens left
    now, busy, seen = 0.0, 0.0, 0
    while seen < load.requests or waiting or left or reading:
        while seen < load.requests and arrivals[seen] <= now:
            waiting.append(seen)
            seen += 1
        if reading is None and waiting and len(left) < slots:
            reading = (waiting.popleft(), load.prompt)
        if reading is None and not left:
            now = float(arrivals[seen])
            continue
        part = min(chunk or load.prompt, reading[1]) if reading else 0
        took = prefill(part) if reading else 0.0
        if left and (reading is None or chunk):
            took += step(len(left))
        now, busy = now + took, busy + took
        if left and (reading is None or chunk):
            _emit(left, last, now)
        if reading is not None:
            request, rest = reading
            reading = (request, rest - part) if rest > part else None
            if reading is None:
                first[request] = last[request] = now
                if load.output > 1:
                    left[request] = load.output - 1
    spread = (last - first) / max(1, load.output - 1)
    return Loaded(first - arrivals, spread, busy / now)


def _emit(left: dict[int, int], last: Array, now: float) -> None:
    """Give every decoding request its token; those that have all leave."""
    for request in list(left):
        last[request] = now
        left[request] -= 1
        if not left[request]:
            del left[request]
