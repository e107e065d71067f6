"""Wrappers that compose around any tier: verify, log, limit, fail, count.

CountTier(VerifyTier(FailTier(MemoryTier(8, 4096), seed=1, flips=0.1)))
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import xxhash

from .errors import TierError
from .tier import Page, Tier, byte_view, byte_views

T = TypeVar("T")


class TierWrapper(Tier):
    """Hands every call on; a wrapper overrides `around`, or the calls it is about."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner

    def around(self, name: str, pages: Sequence[Page], call: Callable[[], T], count: int) -> T:
        """Do one call of the inner tier: its name, its pages (none for keys only), its number of keys."""
        return call()

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Hand on."""
        return self.around("put", pages, lambda: self.inner.put(keys, pages), len(keys))

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Hand on."""
        return self.around("get", out, lambda: self.inner.get(keys, out), len(keys))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Hand on."""
        return self.around("contains", (), lambda: self.inner.contains(keys), len(keys))

    def remove(self, keys: Sequence[bytes]) -> list[bool]:
        """Hand on."""
        return self.around("remove", (), lambda: self.inner.remove(keys), len(keys))

    def commit(self) -> None:
        """Hand on."""
        self.around("commit", (), self.inner.commit, 0)

    def counters(self) -> dict[str, float]:
        """Hand on."""
        return self.inner.counters()

    def close(self) -> None:
        """Close the inner tier too."""
        self.inner.close()
        self.closed = True


class VerifyTier(TierWrapper):
    """Puts 16 bytes behind every page that bind it to its key and length; what disagrees is a miss.

    For tiers that do not check themselves: another machine's memory, an object store. The disk tier does.
    """

    FOOTER_BYTES = 16

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self._damaged = 0

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Put each page with its footer (a copy)."""
        views = byte_views(keys, pages)
        sealed = [
            np.concatenate([view, np.frombuffer(self._footer(key, view), np.uint8)])
            for key, view in zip(keys, views, strict=True)
        ]
        return super().put(keys, sealed)

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Read, check, and only then copy to the caller's buffers."""
        views = byte_views(keys, out, writable=True)
        sealed = [np.empty(view.size + self.FOOTER_BYTES, np.uint8) for view in views]
        found = super().get(keys, sealed)
        return [
            None if length is None else self._checked(key, view, page, length)
            for key, view, page, length in zip(keys, views, sealed, found, strict=True)
        ]

    def _checked(self, key: bytes, view: np.ndarray, sealed: np.ndarray, length: int) -> int | None:
        length = max(length - self.FOOTER_BYTES, 0)
        page = sealed[:length]
        if sealed[length : length + self.FOOTER_BYTES].tobytes() != self._footer(key, page):
            self._damaged += 1
            self.inner.remove([key])
            return None
        view[:length] = page
        return length

    @staticmethod
    def _footer(key: bytes, page: np.ndarray) -> bytes:
        state = xxhash.xxh3_128(page.size.to_bytes(8, "little") + bytes([len(key)]) + key)
        state.update(page.data)
        return state.digest()

    def counters(self) -> dict[str, float]:
        """Also pages that were not what was put."""
        return {**self.inner.counters(), "unverified": self._damaged}


class LogTier(TierWrapper):
    """Writes one debug line per call: name, pages, milliseconds. Neither keys nor content."""

    def __init__(self, inner: Tier, logger: logging.Logger | None = None) -> None:
        super().__init__(inner)
        self._logger = logging.getLogger(__name__) if logger is None else logger

    def around(self, name: str, pages: Sequence[Page], call: Callable[[], T], count: int) -> T:
        """Time it and write it down, also when it fails."""
        begin = time.perf_counter()
        said = "failed"
        try:
            result = call()
            said = "done"
        finally:
            took = (time.perf_counter() - begin) * 1e3
            self._logger.debug("%s of %d pages %s in %.2f ms", name, count, said, took)
        return result


class LimitTier(TierWrapper):
    """Holds the bytes that are put and read to a rate; bursts of up to `burst_bytes` go unhindered.

    Args:
        clock, sleep: the time it goes by; a test gives its own.
    """

    def __init__(
        self,
        inner: Tier,
        bytes_per_second: float,
        burst_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        if bytes_per_second <= 0:
            raise ValueError(f"bytes_per_second={bytes_per_second} must be above 0")
        self._rate, self._burst = bytes_per_second, burst_bytes / bytes_per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._paid_until = clock() - self._burst

    def around(self, name: str, pages: Sequence[Page], call: Callable[[], T], count: int) -> T:
        """Wait until these bytes are within the rate."""
        seconds = sum(byte_view(page).size for page in pages) / self._rate
        with self._lock:
            now = self._clock()
            self._paid_until = max(self._paid_until, now - self._burst) + seconds
            wait = self._paid_until - now
        if seconds and wait > 0:
            self._sleep(wait)
        return call()


class FailTier(TierWrapper):
    """Fails on purpose, page by page, with given probabilities and a seed: the same calls fail again.

    Args:
        misses: a held page is not given.
        refusals: a page is not kept.
        flips: one bit of a page that is given is wrong (put a `VerifyTier` around it).
        errors: a commit raises `TierError`, having done nothing.
    """

    def __init__(
        self,
        inner: Tier,
        seed: int,
        misses: float = 0,
        refusals: float = 0,
        flips: float = 0,
        errors: float = 0,
    ) -> None:
        super().__init__(inner)
        self._draw = random.Random(seed)
        self._misses, self._refusals, self._flips, self._errors = misses, refusals, flips, errors
        self._injected = 0

    def _strikes(self, probability: float) -> bool:
        struck = self._draw.random() < probability
        self._injected += struck
        return struck

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Keep some, refuse others."""
        refused = [self._strikes(self._refusals) for _ in keys]
        chosen = [i for i, no in enumerate(refused) if not no]
        kept = iter(super().put([keys[i] for i in chosen], [pages[i] for i in chosen]))
        return [False if no else next(kept) for no in refused]

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Give some, miss others, spoil others."""
        found = super().get(keys, out)
        for i, length in enumerate(found):
            if length is None:
                continue
            if self._strikes(self._misses):
                found[i] = None
            elif self._strikes(self._flips):
                byte_view(out[i])[self._draw.randrange(length)] ^= 1 << self._draw.randrange(8)
        return found

    def commit(self) -> None:
        """Raise at times."""
        if self._strikes(self._errors):
            raise TierError("commit: an error that was asked for")
        super().commit()

    def counters(self) -> dict[str, float]:
        """Also the failures injected."""
        return {**self.inner.counters(), "injected": self._injected}


class CountTier(TierWrapper):
    """Counts calls, pages, bytes and seconds; hits and misses of `get`, found and absent of `contains`."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Count something, by name."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] = self._counts.get(name, 0) + amount

    def around(self, name: str, pages: Sequence[Page], call: Callable[[], T], count: int) -> T:
        """Count the call, however it ends."""
        begin = time.perf_counter()
        try:
            return call()
        finally:
            seconds = time.perf_counter() - begin
            self.add(**{f"{name}_calls": 1, f"{name}_pages": count, f"{name}_seconds": seconds})

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Count the bytes of pages that are held."""
        kept = super().put(keys, pages)
        held = sum(byte_view(page).size for page, yes in zip(pages, kept, strict=True) if yes)
        self.add(put_bytes=held, refused=kept.count(False))
        return kept

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Count how many of the keys that are looked for are held."""
        held = super().contains(keys)
        self.add(found=held.count(True), absent=held.count(False))
        return held

    def get(self, keys: Sequence[bytes], out: Sequence[Page]) -> list[int | None]:
        """Count hits, misses and the bytes of hits."""
        found = super().get(keys, out)
        lengths = [length for length in found if length is not None]
        self.add(hits=len(lengths), misses=len(found) - len(lengths), get_bytes=sum(lengths))
        return found

    def counters(self) -> dict[str, float]:
        """The inner tier's and these."""
        with self._lock:
            return {**self.inner.counters(), **self._counts}


def prometheus_text(counters: dict[str, float], tier: str) -> str:
    """Write counters in Prometheus' text format, one line each, with the tier's name as label."""
    label = tier.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return "".join(
        f'plait_tier_{name}{{tier="{label}"}} {value:.15g}\n'
        for name, value in sorted(counters.items())
    )
