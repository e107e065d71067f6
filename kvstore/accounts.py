"""What a store says about itself, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import Self
from weakref import finalize

from .audit import check_holders, totals
from .cache import PageCache
from .identity import check_tenant, prefix_key
from .placement import metrics
from .reading import PageReader
from .sequence import Sequence
from .tokens import History, TokenIds, as_token_ids


class StoreAccounts(PageReader):
    """Counts, proves, grows, evicts and ends a store."""

    cache: PageCache
    _sequences: dict[int, Sequence]
    _end: finalize
    _secret: bytes
    _identity: bytes

    def match(self, prompts: Listing[TokenIds], tenant: str | None = None) -> list[int]:
        """Say what is cached of each prompt, in tokens, in all tiers; nothing is pinned or fetched."""
        rows, key = [as_token_ids(row) for row in prompts], self._key(tenant)
        histories = [History(key, row, self.spec.page_tokens) for row in rows]
        with self._lock:
            found = [self.cache.match(history) for history in histories]
        if self.placement is None:
            return found
        reach = [self.placement.reach(history) for history in histories]
        size = self.spec.page_tokens
        return [
            max(tokens, (history.indexed + len(keys)) * size)
            for tokens, history, keys in zip(found, histories, reach, strict=True)
        ]

    def _key(self, tenant: str | None) -> bytes:
        return prefix_key(self._secret, self._identity, check_tenant(tenant))

    def grow(self, num_pages: int | None = None) -> int:
        """Enlarge the store now (default: double); return its pages. A copy, never in a step.

        Raises:
            PoolExhausted: if `device_bytes` does not allow that many.
        """
        with self._lock:
            return self.cache.grow(2 * self.pool.capacity if num_pages is None else num_pages)

    def evict(self, num_pages: int | None = None) -> int:
        """Lose cached pages that no sequence holds (default: all); return how many.

        Tiers keep them: a full page that is not there yet is written down first.
        """
        with self._lock:
            return self.cache.evict(self.pool.cached_pages if num_pages is None else num_pages)

    def counters(self) -> dict[str, int]:
        """Count pages, bytes and sequences on the device since the store was made."""
        with self._lock:
            return totals(self.cache, len(self._sequences))

    def tier_counters(self) -> dict[str, dict[str, float]]:
        """Count hits, misses, bytes and seconds of each tier, and under "moves" what went up and down."""
        return {} if self.placement is None else self.placement.counters()

    def prometheus(self) -> str:
        """Write all counters in Prometheus' text format, with the tier as label."""
        return metrics(self.counters(), self.tier_counters())

    def check_integrity(self) -> None:
        """Prove the store's invariants: counts, states, free runs, lengths, prefixes.

        Raises:
            IntegrityError: naming what does not hold.
        """
        with self._lock:
            check_holders(self.cache, list(self._sequences.values()))

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until every full page whose ids are known is in the tiers, durably; say whether that was in time.

        Such pages go down by themselves; this is the moment from which they survive the process. A page that a tier
        refuses (a full disk) is counted and not waited for.
        """
        return self.placement is None or self.placement.flush(seconds)

    def shutdown(self, seconds: float | None = 60.0) -> bool:
        """Flush and close the tiers; the store goes on without them. Says whether the flush was in time."""
        if self.placement is None:
            return True
        try:
            return self.placement.close(seconds)
        finally:
            # else a placement that knows of the store would keep it for ever
            if self.placement.closed:
                self._end.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
