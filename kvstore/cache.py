"""Pages that outlive their sequences: pool, prefix index and eviction policy told the same story."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .chains import CHILDREN, PARENT
from .errors import IntegrityError, PoolExhausted, StoreError
from .evict import Chain, EvictionPolicy
from .pool import PagePool
from .prefix import PrefixIndex
from .tokens import History


@dataclass
class CacheCounters:
    """What the prefix index was asked, and what it gave, since the store was made."""

    lookups: int = 0
    tokens_asked: int = 0
    tokens_found: int = 0
    pages_indexed: int = 0
    pages_merged: int = 0
    pages_evicted: int = 0


class Below(Protocol):
    """Where pages go that the pool loses; told under the store's lock."""

    def admitted(self, pages: np.ndarray) -> None:
        """The index got these pages."""
        ...

    def losing(self, pages: np.ndarray) -> None:
        """These are evicted: their content is there until the call returns."""
        ...


class PageCache:
    """Keeps the pages of finished sequences findable until their room is needed.

    Args:
        pool: the pages.
        policy: who goes first.
        max_pages: how far the pool may grow; None: without limit.

    Attributes:
        below: hears of pages that come and go, if there are tiers.

    State: not thread-safe; the store holds its lock around every call.
    """

    def __init__(self, pool: PagePool, policy: EvictionPolicy, max_pages: int | None) -> None:
        self.pool = pool
        self.policy = policy
        self.max_pages = max_pages
        self.index = PrefixIndex(pool)
        self.counters = CacheCounters()
        self.below: Below | None = None
        self._attach()

    def _attach(self) -> None:
        links = self.index.links
        self.policy.attach(Chain(links[PARENT], links[CHILDREN], self.pool.refcounts))

    # -- room --------------------------------------------------------------------------------

    def grow(self, capacity: int) -> int:
        """Enlarge the pool; see `PagePool.grow`.

        Raises:
            PoolExhausted: if that is more than `max_pages`.
        """
        pool = self.pool
        if self.max_pages is not None and capacity > self.max_pages:
            room = pool.free_pages + pool.cached_pages
            raise PoolExhausted(capacity, room, pool.held_pages, self.max_pages)
        if capacity > pool.capacity:
            pool.grow(capacity)
            self.index.resize()
            self._attach()
        return pool.capacity

    def allocate(self, counts: np.ndarray, afters: np.ndarray) -> np.ndarray:
        """Take pages (see `PagePool.allocate`), growing or evicting if too few are free.

        A pool with a limit grows to it before it evicts; one without grows only while more than half
        of it is held, so that what is merely cached does not make it grow for ever.

        Raises:
            PoolExhausted: if growing and evicting do not suffice; nothing is changed then.
        """
        pool = self.pool
        count = int(counts.sum())
        short = count - pool.free_pages
        if short > 0:
            have = pool.capacity
            want = max(2 * have, have + short)
            if self.max_pages is None:
                if pool.cached_pages >= max(short, have // 2):
                    want = have
            else:
                want = min(want, self.max_pages)
            if want - have + pool.cached_pages < short:
                raise PoolExhausted(count, want - pool.held_pages, pool.held_pages, want)
            if want > have:
                self.grow(want)
            self.evict(count - pool.free_pages)
        return pool.allocate(counts, afters)

    # -- finding -----------------------------------------------------------------------------

    def match(self, history: History) -> int:
        """Say how many tokens of a prompt are cached; at least one is left to compute."""
        if not history.known:
            return 0
        match = self.index.match(history.key, history.ids, history.known - 1)
        history.found(match.full_pages, match.hasher)
        return match.tokens

    def pin(self, history: History) -> tuple[np.ndarray, int]:
        """Hold the longest cached prefix of a prompt: (pages, tokens)."""
        ids = history.ids
        self.counters.lookups += 1
        self.counters.tokens_asked += len(ids)
        if len(ids) < 2:
            return np.empty(0, np.int32), 0
        match = self.index.match(history.key, ids, len(ids) - 1)
        self._hold(match.pages)
        history.found(match.full_pages, match.hasher)
        self.counters.tokens_found += match.tokens
        return match.pages, match.tokens

    def _hold(self, pages: np.ndarray) -> None:
        cached = self.pool.share(pages)
        if len(cached):
            self.policy.pinned(cached)
        if len(pages):
            self.policy.touched(pages)

    # -- keeping -----------------------------------------------------------------------------

    def record(self, history: History, pages: np.ndarray, length: int) -> np.ndarray:
        """Index the full pages of a sequence whose token ids are known; give its pages.

        A page whose tokens the index has already is given back for the one it has.
        """
        first, stop = history.indexed, min(length, history.known) // self.index.size
        if stop <= first:
            return pages
        promised = self.pool.promised[pages[first:stop]]
        settled = self.index.extend(history, pages, stop)
        mine = pages[first : first + len(settled)]
        own = settled == mine
        again = mine[own & (promised[: len(mine)] > 0)]
        if len(again):  # a partial page that became full
            self.policy.removed(again)
        self._admit(mine[own], first + np.flatnonzero(own))
        if own.all():
            return pages
        self._hold(settled[~own])
        self.release(mine[~own])
        self.counters.pages_merged += int((~own).sum())
        return np.concatenate([pages[:first], settled, pages[first + len(settled) :]])

    def record_tail(self, history: History, pages: np.ndarray, length: int) -> None:
        """Index the partial last page of a sequence that ends."""
        full, tail = divmod(length, self.index.size)
        if not tail or history.indexed < full or history.known < length:
            return
        last = pages[-1:]
        promised = self.pool.promised[last[0]]
        if self.index.add_partial(history, pages, tail):
            if promised:
                self.policy.removed(last)
            self._admit(last, np.array([full]))

    def _admit(self, pages: np.ndarray, depths: np.ndarray) -> None:
        if len(pages):
            if self.below is not None:
                self.below.admitted(pages)
            self.policy.admitted(pages, self.index.digests[pages, 0], depths)
            self.counters.pages_indexed += len(pages)

    def release(self, pages: np.ndarray) -> None:
        """Let go of pages; those in the index stay cached."""
        kept = self.pool.release(pages)
        if len(kept):
            self.policy.unpinned(kept)

    def evict(self, count: int) -> int:
        """Lose up to `count` cached pages, as the policy says; return how many.

        Raises:
            StoreError: if the policy names pages that may not go, or none; no page is lost.
        """
        left = count = max(0, min(count, self.pool.cached_pages))
        while left:
            pages = np.asarray(self.policy.victims(left), np.int32)
            valid = 0 < len(pages) <= left and 0 <= pages.min() <= pages.max() < self.pool.capacity
            done = self.index.remove(pages) if valid else 0
            if done and self.below is not None:
                self.below.losing(pages[:done])
            self.pool.free_cached(pages[:done])
            if done:
                self.policy.removed(pages[:done])
            self.counters.pages_evicted += done
            left -= done
            if done < len(pages) or not valid:
                raise StoreError(
                    f"eviction policy {type(self.policy).__name__} was asked for {left + done} of "
                    f"{self.pool.cached_pages + done} cached pages and named {pages[done:].tolist()[:8]}, "
                    "which are none that may go: pinned, followed by a cached page, or not cached"
                )
        return count

    def check_history(self, history: History, pages: np.ndarray, length: int) -> None:
        """Prove that a sequence's indexed pages are a chain of the index with its ids.

        Raises:
            IntegrityError: saying that they are not.
        """
        count, size = history.indexed, self.index.size
        mine, ids = pages[:count], history.ids[: count * size].reshape(count, size)
        if count > length // size or (self.index.links[PARENT, mine[1:]] != mine[:-1]).any():
            raise IntegrityError("a sequence's indexed pages are no chain of the index")
        if (self.index.ids[mine] != ids).any() or (self.pool.promised[mine] != size).any():
            raise IntegrityError("a sequence's indexed pages hold other tokens")
