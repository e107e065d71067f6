"""Where a store's pages are besides its pool, and whether to fetch them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .cache import PageCache
from .encoding import PageEncoding
from .fetch import Fetch, Fetcher
from .outbox import Outbox
from .sequence import Sequence
from .spec import parse_bytes
from .tiers import (
    Choice,
    DiskTier,
    MemoryTier,
    Moves,
    PageForm,
    PrefillMeter,
    Tier,
    TierStack,
    directory_secret,
    fetch_or_recompute,
)
from .tiers.wrappers import prometheus_text
from .tokens import History

if TYPE_CHECKING:
    from .step import Step

FetchRule = Literal["sooner", "always"]


class Placement:
    """The tiers below one store's pool, and the ways there: down in `Outbox`, up in `Fetcher`, both over one `Moves`.

    Args:
        cache: the store's pages; told to report to the outbox.
        lock: the store's.
        fetch: "sooner": fetch what is fetched sooner than it is computed again, by what was measured; "always".
        clock: the time that deadlines are in.
    """

    def __init__(
        self,
        cache: PageCache,
        lock: Any,
        stack: TierStack,
        encoding: PageEncoding,
        fetch: FetchRule = "sooner",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if fetch not in ("sooner", "always"):
            raise ValueError(f"fetch={fetch!r} must be 'sooner' or 'always'")
        self._cache, self.stack, self._encoding = cache, stack, encoding
        self._lock, self._rule, self._clock = lock, fetch, clock
        self.prefill = PrefillMeter()
        self.moves = Moves(stack, clock=clock)
        self.outbox = Outbox(cache, lock, encoding, self.moves)
        self.fetcher = Fetcher(cache, lock, encoding, stack, self.moves, clock)
        self._counts: Counter[str] = Counter(
            dict.fromkeys(
                ("lookups", "pages_found", "recomputes", "tokens_recomputed", "cancelled"), 0
            )
        )
        self.closed = False
        cache.below = self.outbox

    # -- up ----------------------------------------------------------------------------------

    def reach(self, history: History) -> list[bytes]:
        """Find the full pages after a sequence's indexed ones that some tier holds; give their keys.

        The number of pages asked for doubles, so that a miss costs one hash and one question.
        """
        first, step, keys = history.indexed, 1, []
        most = (history.known - 1) // self._cache.index.size
        ahead = history.copy()
        while first < most:
            stop = min(first + step, most)
            batch = [words.tobytes() for words in ahead.digests(first, stop)]
            held = self.stack.contains(batch)
            found = held.index(False) if False in held else len(held)
            keys += batch[:found]
            if found < len(batch):
                break
            first, step = stop, 2 * step
        return keys

    def seek(self, seq: Sequence, seconds: float | None) -> None:
        """Begin to fetch what the tiers hold of a sequence's prompt beyond its device prefix, if that pays."""
        history = seq.history
        if history is None or self.closed:
            return
        keys = self.reach(history)
        size, full = self._cache.index.size, history.indexed
        gain = (full + len(keys)) * size - seq.tokens
        with self._lock:
            self._counts["lookups"] += 1
            self._counts["pages_found"] += len(keys)
        if gain <= 0:
            return
        limit = float("inf") if seconds is None else seconds
        if self._rule == "sooner":
            choice = self._choose(keys, gain, seq.tokens)
            if not choice.fetch:
                with self._lock:
                    self._counts["recomputes"] += 1
                    self._counts["tokens_recomputed"] += gain
                return
            if choice.recompute_seconds > 0:  # later than that it would have been better not to ask
                limit = min(limit, choice.recompute_seconds)
        ids = history.ids[full * size : (full + len(keys)) * size].reshape(-1, size).copy()
        last = int(seq.pages[full - 1]) if full else -1
        seq.fetch = Fetch(keys, ids, last, self._clock() + limit)
        self.fetcher.begin(seq.fetch)

    def _choose(self, keys: list[bytes], tokens: int, after: int) -> Choice:
        speed, page_bytes = self.prefill.speed, self._encoding.page_bytes
        if speed is None:
            return Choice(True, 0.0, 0.0)  # nothing was computed yet that could be compared
        seconds = self.stack.seconds(self.stack.where(keys), page_bytes)
        whole = len(keys) * page_bytes
        return fetch_or_recompute(
            tokens, whole // tokens, speed, whole / seconds if seconds else None,
            self.moves.waiting_bytes, after,
        )  # fmt: skip

    def settle(self, seq: Sequence) -> None:
        """Make what arrived part of the sequence, under the store's lock; the rest is not waited for."""
        fetch, history = seq.fetch, seq.history
        if fetch is None or history is None:
            return
        if not fetch.done.is_set():
            self._counts["cancelled"] += 1
        fetch.over, seq.fetch = True, None
        cache, full = self._cache, history.indexed
        if not len(fetch.pages):
            return
        cache.pool.commit(fetch.pages)
        cache.release(seq.pages[full:])  # a partial page that begins like the one that came
        length = (full + len(fetch.pages)) * cache.index.size
        seq.pages = cache.record(history, np.concatenate([seq.pages[:full], fetch.pages]), length)
        self.outbox.known(seq.pages[full:])
        cache.counters.tokens_found += length - seq.tokens
        seq.tokens = seq.found_tokens = length

    # -- measuring ---------------------------------------------------------------------------

    def computed(self, step: Step) -> None:
        """A step has all its layers: if it was a prefill, note how long it took."""
        tokens = step.num_tokens
        if tokens >= 2 * self._cache.index.size and len(step.seqs) == 1:
            self.prefill.add(tokens, int(step.bases[0]), time.perf_counter() - step.began)

    def counters(self) -> dict[str, dict[str, float]]:
        """Count what each tier did, by its name, and under "moves" what went between them and the pool."""
        moves = {**self._counts, **self.outbox.counts, **self.fetcher.counts}
        out = {name: tier.counters() for name, tier in self.stack.tiers.items()}
        return {**out, "moves": {**moves, "waiting_bytes": self.moves.waiting_bytes}}

    # -- the end -----------------------------------------------------------------------------

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until what can be is written down and durable; say whether that was in time."""
        return self.outbox.flush(seconds)

    def close(self, seconds: float | None = None) -> bool:
        """Flush, end all threads and close the tiers; again does nothing."""
        if self.closed:
            return True
        in_time = self.flush(seconds)
        self.closed = True
        self.fetcher.close()
        self.outbox.close()
        self._cache.below = None
        self.moves.close()
        self.stack.close()
        return in_time

    def end(self, seconds: float) -> None:
        """Close after the store was dropped, in whatever thread the garbage collector found that.

        It may be one of ours, which can neither flush while it waits nor wait for its own end: another one closes then.
        """
        ours = {self.outbox.thread, self.fetcher.thread, *self.moves.threads}
        if threading.current_thread() in ours:
            threading.Thread(target=self.close, args=(seconds,), name="plait-close").start()
        else:
            self.close(seconds)


def make_tiers(
    form: PageForm,
    size: int,
    host_bytes: int | str | None,
    disk: str | Path | None,
    disk_bytes: int | str | None,
    disk_mode: Literal["write", "read"],
    more: Mapping[str, Tier] | None,
) -> dict[str, Tier]:
    """Make the tiers of a store for pages of at most `size` bytes, the fastest first.

    Raises:
        ValueError: if one has no room for a page, or `disk_bytes` comes without `disk`.
        OSError: what the directory says: missing, read-only, full, locked, another's.
    """
    tiers: dict[str, Tier] = {}
    if host_bytes is not None:
        room = parse_bytes(host_bytes) // size
        if room < 1:
            raise ValueError(f"host_bytes={host_bytes} holds no page of {size} bytes; give more")
        tiers["host"] = MemoryTier(room, size)
    if disk is None and disk_bytes is not None:
        raise ValueError(f"disk_bytes={disk_bytes} needs disk=, the directory")
    if disk is not None:
        try:
            tiers["disk"] = DiskTier(disk, form, size, disk_bytes, mode=disk_mode)
        except FileNotFoundError as error:
            hint = "" if disk_mode == "read" else "; give disk_bytes, what a new one may take"
            raise FileNotFoundError(f"disk={str(disk)!r} holds no cache yet{hint}") from error
    return {**tiers, **(more or {})}


def disk_secret(tiers: Mapping[str, Tier]) -> bytes | None:
    """Give the secret of the directory among the tiers, None if there is none."""
    for tier in tiers.values():
        if isinstance(tier, DiskTier):
            return directory_secret(tier.folder, create=tier.mode == "write")
    return None


def metrics(device: dict[str, int], tiers: dict[str, dict[str, float]]) -> str:
    """Write all counters as Prometheus text, one family name and the tier as label."""
    named = {"device": {**device}, **tiers}
    return "".join(prometheus_text(dict(counts), name) for name, counts in named.items())
