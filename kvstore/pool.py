"""The page pool: one preallocated region per layer, free runs of pages, reference counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cuda_kernels import Regions, copy_pages
from . import extents
from .errors import IntegrityError, PoolExhausted
from .page import PageState, move_pages
from .spec import KVSpec


@dataclass
class PoolCounters:
    """Pages that went through the pool since it was made."""

    allocated: int = 0
    freed: int = 0
    shared: int = 0
    copied: int = 0
    grown: int = 0


class PagePool:
    """Pages of all layers, handed out and taken back by number.

    One page number names the same page in every layer. Consecutive page numbers are consecutive in
    memory, so a run of pages is one contiguous `[tokens, kv_heads, d]` view.

    State: not thread-safe; the store holds its lock around every call.

    Shape: `keys[layer]`, `values[layer]`: `[capacity, page_tokens, kv_heads, d]`.
    """

    def __init__(self, spec: KVSpec, capacity: int) -> None:
        self.spec = spec
        self.counters = PoolCounters()
        self.keys = [self._region(capacity, spec.head_dim) for _ in range(spec.layers)]
        self.values = (
            self.keys
            if spec.shared_kv
            else [self._region(capacity, spec.v_dim) for _ in range(spec.layers)]
        )
        self.regions = Regions(self._all)
        self.free_pages = 0
        self.cached_pages = 0
        self.meta = np.zeros((6, 0), np.int32)
        self._bins = np.full(extents.BINS, -1, np.int32)
        self._add_pages(capacity)

    def _region(self, pages: int, width: int) -> Tensor:
        shape = (pages, self.spec.page_tokens, self.spec.kv_heads, width)
        # Written once here so that no page fault falls into a decode step.
        return torch.zeros(shape, dtype=self.spec.dtype, device=self.spec.device).fill_(0)

    def _add_pages(self, extra: int) -> None:
        first = self.capacity
        self.meta = np.concatenate([self.meta, np.zeros((6, extra), np.int32)], 1)
        extents.add_run(self.meta, self._bins, first, extra)
        self.free_pages += extra

    @property
    def _groups(self) -> list[list[Tensor]]:
        return [self.keys] if self.spec.shared_kv else [self.keys, self.values]

    @property
    def _all(self) -> list[Tensor]:
        return [region for group in self._groups for region in group]

    @property
    def capacity(self) -> int:
        """Pages there are."""
        return self.meta.shape[1]

    @property
    def states(self) -> np.ndarray:
        """Each page's `PageState`, `[capacity]`."""
        return self.meta[extents.STATE]

    @property
    def refcounts(self) -> np.ndarray:
        """How many sequences and steps hold each page, `[capacity]`."""
        return self.meta[extents.HOLDERS]

    @property
    def promised(self) -> np.ndarray:
        """Tokens of each page that the prefix index can find, `[capacity]`: these never change."""
        return self.meta[extents.PROMISED]

    @property
    def held_pages(self) -> int:
        """Pages that a sequence or step holds."""
        return self.capacity - self.free_pages - self.cached_pages

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that somebody holds."""
        return self.held_pages * self.spec.bytes_per_page

    def allocate(self, counts: np.ndarray, afters: np.ndarray) -> np.ndarray:
        """Take free pages for several owners, RESERVED with one reference; all of them or none.

        Args:
            counts: pages wanted by each owner.
            afters: the page they would best follow (the owner's last), or -1.

        Shape: counts, afters `[owners]` int64 -> `[sum(counts)]` int32, owner after owner.

        Raises:
            PoolExhausted: if fewer are free; nothing is taken.
        """
        count = int(counts.sum())
        if count > self.free_pages:
            raise PoolExhausted(
                count, self.free_pages, self.capacity - self.free_pages, self.capacity
            )
        pages = np.empty(count, np.int32)
        if count:
            extents.take(self.meta, self._bins, counts, afters, pages)
            self.free_pages -= count
            self.counters.allocated += count
        return pages

    def commit(self, pages: np.ndarray) -> None:
        """Make reserved pages LIVE."""
        if len(pages):
            move_pages(self.states, pages, PageState.LIVE)

    def share(self, pages: np.ndarray) -> np.ndarray:
        """Add one holder to each of some LIVE or CACHED pages; give those that were CACHED.

        A LIVE page may be named more than once.
        """
        if len(pages) == 0:
            return pages
        states = self.states[pages]
        cached = pages[states == PageState.CACHED]
        if len(cached):
            move_pages(self.states, cached, PageState.LIVE)
            self.cached_pages -= len(cached)
        if (self.states[pages] != PageState.LIVE).any():
            raise IntegrityError("only LIVE and CACHED pages can be shared")
        np.add.at(self.refcounts, pages, 1)
        self.counters.shared += len(pages)
        return cached

    def release(self, pages: np.ndarray) -> np.ndarray:
        """Drop one holder of each page; give those nobody holds any more that stay CACHED.

        The others without a holder become FREE.
        """
        kept = np.empty(len(pages), np.int32)
        if len(pages) == 0:
            return kept
        cached, freed = extents.release(self.meta, self._bins, pages, kept)
        if cached < 0:
            raise IntegrityError(
                f"page {pages[-1 - cached]} was released more often than it was held"
            )
        self.cached_pages += cached
        self.free_pages += freed
        self.counters.freed += freed
        return kept[:cached]

    def free_cached(self, pages: np.ndarray) -> None:
        """Make CACHED pages FREE; the index has forgotten them already."""
        bad = extents.free_cached(self.meta, self._bins, pages)
        if bad >= 0:
            raise IntegrityError(f"page {pages[bad]} is not CACHED and cannot be evicted")
        self.cached_pages -= len(pages)
        self.free_pages += len(pages)
        self.counters.freed += len(pages)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages in every layer."""
        if len(source) == 0:
            return
        copy_pages(self.regions, target, self.regions, source)
        self.counters.copied += len(source)

    def lift(self, pages: np.ndarray, out: Regions, rows: np.ndarray) -> None:
        """Copy whole pages of all layers out, into some rows.

        Shape: pages, rows `[n]`; out: K of each layer, then V of each, `[rows, page_tokens, kv_heads, d]`.
        """
        copy_pages(out, rows, self.regions, pages)

    def lay(self, pages: np.ndarray, rows_of: Regions, rows: np.ndarray) -> None:
        """Write whole pages of all layers from some rows, laid out as for `lift`; the pages are RESERVED."""
        copy_pages(self.regions, pages, rows_of, rows)

    def grow(self, capacity: int) -> int:
        """Enlarge the pool to `capacity` pages by copying, one layer at a time; return it.

        Views taken before (`keys_values`) keep the old memory alive and see no later writes.
        """
        extra = capacity - self.capacity
        if extra <= 0:
            return self.capacity
        for group in self._groups:
            for layer, old in enumerate(group):
                new = self._region(capacity, old.shape[-1])
                new[: self.capacity] = old
                group[layer] = new
        self.regions = Regions(self._all)
        self._add_pages(extra)
        self.counters.grown += 1
        return capacity

    def check_integrity(self, holders: np.ndarray) -> None:
        """Prove that states, references and the free runs tell one story.

        Args:
            holders: how often each page is held, counted by the caller from its tables, `[capacity]`.

        Raises:
            IntegrityError: naming the first page that disagrees.
        """
        states, counts, promised = self.states, self.refcounts, self.promised
        owned = (states == PageState.RESERVED) | (states == PageState.LIVE)
        checks = {
            "has a reference but nobody's state": ~owned & (counts != 0),
            "has no reference but an owner's state": owned & (counts < 1),
            "has a count that differs from its holders": counts != holders,
            "is CACHED but in no prefix": (states == PageState.CACHED) & (promised < 1),
            "is in a prefix but not LIVE or CACHED": (promised > 0) & (states < PageState.LIVE),
        }
        for what, wrong in checks.items():
            if wrong.any():
                page = int(np.flatnonzero(wrong)[0])
                raise IntegrityError(
                    f"page {page} {what} (state {PageState(states[page]).name}, count "
                    f"{counts[page]}, holders {holders[page]})"
                )
        runs = extents.true_runs(self.meta)
        if extents.listed_runs(self.meta, self._bins) != runs:
            raise IntegrityError("the lists of free runs differ from the pages that are FREE")
        tally = (sum(length for _, length in runs), int((states == PageState.CACHED).sum()))
        if tally != (self.free_pages, self.cached_pages):
            raise IntegrityError(
                f"{tally} pages are FREE and CACHED, counted {self.free_pages}, {self.cached_pages}"
            )
