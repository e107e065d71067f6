"""Whether to fetch cached pages or to compute them again: whichever is done sooner, from what was measured."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FORGET = 0.9  # weight that a measurement keeps when another one of `SETTLED` seconds comes
SETTLED = 0.05
RUNS = 32  # prefills that are remembered


class Meter:
    """Measures bytes per second of transfers that overlap: bytes moved over time in which any was under way.

    Older measurements count less and less, so the rate follows a disk that slows down.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0
        self._bytes = self._seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[int], None]]:
        """Measure one transfer; it says how many bytes it moved."""
        sizes: list[int] = []
        with self._lock:
            self._settle()
            self._active += 1
        try:
            yield sizes.append
        finally:
            with self._lock:
                self._settle()
                self._active -= 1
                self._bytes += sum(sizes)

    def _settle(self) -> None:
        now = self._clock()
        if self._active:
            elapsed = now - self._since
            keep = FORGET ** (elapsed / SETTLED)
            self._bytes *= keep
            self._seconds = self._seconds * keep + elapsed
        self._since = now

    @property
    def bytes_per_second(self) -> float | None:
        """The rate now, or None before anything was measured."""
        with self._lock:
            return self._bytes / self._seconds if self._seconds and self._bytes else None


@dataclass(frozen=True)
class PrefillSpeed:
    """Seconds that prefill takes: so much a token, and so much for each pair of token and earlier token."""

    per_token: float
    per_pair: float = 0.0

    def seconds(self, tokens: int, after: int = 0) -> float:
        """Time of `tokens` more tokens after some that are there."""
        return self.per_token * tokens + self.per_pair * tokens * (after + (tokens - 1) / 2)

    @classmethod
    def fit(cls, runs: Sequence[tuple[int, int, float]]) -> PrefillSpeed:
        """Fit measured prefills: (tokens, tokens before them, seconds) each. Neither part is below zero."""
        if not runs:
            raise ValueError("PrefillSpeed.fit needs at least one measured prefill")
        tokens, after, seconds = (
            np.array(column, np.float64) for column in zip(*runs, strict=True)
        )
        pairs = tokens * (after + (tokens - 1) / 2)
        (per_token, per_pair), *_ = np.linalg.lstsq(
            np.stack([tokens, pairs], 1), seconds, rcond=None
        )
        if len(runs) == 1 or per_pair < 0:
            return cls(float(seconds.sum() / tokens.sum()))
        if per_token < 0:
            return cls(0.0, float(seconds.sum() / pairs.sum()))
        return cls(float(per_token), float(per_pair))


class PrefillMeter:
    """Measures prefill speed from the latest prefills."""

    def __init__(self) -> None:
        self._runs: deque[tuple[int, int, float]] = deque(maxlen=RUNS)

    def add(self, tokens: int, after: int, seconds: float) -> None:
        """Note one prefill: so many tokens after so many others."""
        self._runs.append((tokens, after, seconds))

    @property
    def speed(self) -> PrefillSpeed | None:
        """The speed that fits them, None before the first."""
        runs = list(self._runs)
        return PrefillSpeed.fit(runs) if runs else None


@dataclass(frozen=True)
class Choice:
    """What to do, and the two times it was decided from."""

    fetch: bool
    fetch_seconds: float
    recompute_seconds: float


def fetch_or_recompute(
    tokens: int,
    token_bytes: int,
    prefill: PrefillSpeed,
    bytes_per_second: float | None,
    waiting_bytes: int = 0,
    after: int = 0,
) -> Choice:
    """Choose for a run of cached tokens.

    Args:
        tokens: how many are cached and wanted.
        token_bytes: what one takes in the tier.
        bytes_per_second: of loads (`Moves.loading`); None, not yet measured: fetch, which measures it.
        waiting_bytes: what is before them in the queue (`Moves.waiting_bytes`).
        after: tokens before them that are there already.
    """
    recompute = prefill.seconds(tokens, after)
    if bytes_per_second is None:
        return Choice(True, 0.0, recompute)
    fetch = (tokens * token_bytes + waiting_bytes) / bytes_per_second
    return Choice(fetch < recompute, fetch, recompute)
