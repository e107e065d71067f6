"""The proof that a store's sequences, steps and pool tell one story."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import asdict

import numpy as np

from .cache import PageCache
from .errors import IntegrityError, StepError
from .page import PageState
from .sequence import Sequence


def check_holders(cache: PageCache, sequences: Listing[Sequence]) -> None:
    """Count who holds each page and compare with the pool and the prefix index.

    Raises:
        IntegrityError: naming what does not hold.
    """
    pool = cache.pool
    holders = np.zeros(pool.capacity, np.int32)
    steps = {id(seq.step): seq.step for seq in sequences if seq.step is not None}
    for seq in sequences:
        np.add.at(holders, seq.pages, 1)
        if len(np.unique(seq.pages)) != len(seq.pages):
            raise IntegrityError(f"sequence {seq.number} holds a page twice")
        if len(seq.pages) != -(-seq.tokens // pool.spec.page_tokens):
            raise IntegrityError(f"{seq!r} does not fit its pages")
        if (pool.states[seq.pages] != PageState.LIVE).any():
            raise IntegrityError(f"{seq!r} holds a page that is not LIVE")
        if seq.history is not None:
            cache.check_history(seq.history, seq.pages, seq.tokens)
        if seq.fetch is not None:
            np.add.at(holders, seq.fetch.pages, 1)
            if (pool.states[seq.fetch.pages] != PageState.RESERVED).any():
                raise IntegrityError(f"{seq!r} fetches into a page that is not RESERVED")
    for step in steps.values():
        np.add.at(holders, step.pages, 1)
        if (pool.states[step.pages] != PageState.RESERVED).any():
            raise IntegrityError("an open step holds a page that is not RESERVED")
    pool.check_integrity(holders)
    cache.index.check_integrity()


def totals(cache: PageCache, sequences: int) -> dict[str, int]:
    """Count pages, bytes and prefix lookups of a store since it was made."""
    pool, counters = cache.pool, cache.pool.counters
    return {
        "pages": pool.capacity,
        "pages_free": pool.free_pages,
        "pages_cached": pool.cached_pages,
        "pages_allocated": counters.allocated,
        "pages_freed": counters.freed,
        "pages_shared": counters.shared,
        "pages_copied": counters.copied,
        "times_grown": counters.grown,
        "bytes_used": pool.used_bytes,
        "bytes_cached": pool.cached_pages * pool.spec.bytes_per_page,
        "bytes_held": pool.capacity * pool.spec.bytes_per_page,
        "sequences": sequences,
        "tenants_cached": cache.index.tenants,
        "hash_collisions": cache.index.collisions,
        **asdict(cache.counters),
    }


def busy(seq: Sequence) -> StepError:
    """Say that a sequence is in the middle of a step."""
    return StepError(f"sequence {seq.number} has an open step; commit or abort it first")
