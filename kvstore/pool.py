"""The page pool: one preallocated region per layer, a free list, reference counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
        self.capacity = capacity
        self.counters = PoolCounters()
        self.keys = [self._region(capacity, spec.head_dim) for _ in range(spec.layers)]
        self.values = (
            self.keys
            if spec.shared_kv
            else [self._region(capacity, spec.v_dim) for _ in range(spec.layers)]
        )
        self.states = np.zeros(capacity, np.uint8)
        self.refcounts = np.zeros(capacity, np.int32)
        # A stack with the lowest number on top. Kept unsorted on free; see allocate.
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self._free_count = capacity

    def _region(self, pages: int, width: int) -> Tensor:
        shape = (pages, self.spec.page_tokens, self.spec.kv_heads, width)
        # Written once here so that no page fault falls into a decode step.
        return torch.zeros(shape, dtype=self.spec.dtype, device=self.spec.device).fill_(0)

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated now."""
        return self._free_count

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that somebody owns."""
        return (self.capacity - self._free_count) * self.spec.bytes_per_page

    def allocate(self, count: int, after: int = -1) -> np.ndarray:
        """Take `count` free pages, RESERVED with one reference; consecutive numbers if possible.

        Args:
            count: pages wanted.
            after: a page they would best follow (a sequence's last page).

        Raises:
            PoolExhausted: if fewer are free; nothing is taken.
        """
        if count > self._free_count:
            raise PoolExhausted(
                count, self._free_count, self.capacity - self._free_count, self.capacity
            )
        if count == 0:
            return np.empty(0, np.int32)
        pages = self._consecutive(count, after)
        if pages is None:
            self._free_count -= count
            pages = self._free[self._free_count : self._free_count + count][::-1].copy()
        move_pages(self.states, pages, PageState.RESERVED)
        self.refcounts[pages] = 1
        self.counters.allocated += count
        return pages

    def _consecutive(self, count: int, after: int) -> np.ndarray | None:
        """Take a run that follows `after`, or any run of `count` near the top of the stack."""
        top = self._free[self._free_count - count : self._free_count][::-1]
        if after < 0 and (count == 1 or bool((np.diff(top) == 1).all())):
            return None  # the stack's own order is good enough
        first = after + 1
        run = slice(first, first + count)
        if after < 0 or run.stop > self.capacity or self.states[run].any():
            if count == 1:
                return None
            free = self.states == PageState.FREE
            edges = np.flatnonzero(np.diff(np.concatenate([[0], free.view(np.int8), [0]])))
            starts, stops = edges[::2], edges[1::2]
            fits = np.flatnonzero(stops - starts >= count)
            if not fits.size:
                return None
            best = fits[np.argmin((stops - starts)[fits])]
            run = slice(int(starts[best]), int(starts[best]) + count)
        pages = np.arange(run.start, run.stop, dtype=np.int32)
        stack = self._free[: self._free_count]
        rest = stack[(stack < run.start) | (stack >= run.stop)]
        self._free_count = rest.size
        self._free[: rest.size] = rest
        return pages

    def commit(self, pages: np.ndarray) -> None:
        """Make reserved pages LIVE."""
        move_pages(self.states, pages, PageState.LIVE)

    def share(self, pages: np.ndarray) -> None:
        """Add one holder to each of some LIVE pages (a page may be named more than once)."""
        if (self.states[pages] != PageState.LIVE).any():
            raise IntegrityError("only LIVE pages can be shared")
        np.add.at(self.refcounts, pages, 1)
        self.counters.shared += len(pages)

    def release(self, pages: np.ndarray) -> None:
        """Drop one holder of each page; pages without holders become FREE."""
        if len(pages) == 0:
            return
        if (self.refcounts[pages] < 1).any():
            raise IntegrityError("a page was released more often than it was held")
        np.subtract.at(self.refcounts, pages, 1)
        gone = pages[self.refcounts[pages] == 0]
        if len(gone) == 0:
            return
        move_pages(self.states, gone, PageState.FREE)
        self._free[self._free_count : self._free_count + len(gone)] = gone[::-1]
        self._free_count += len(gone)
        self.counters.freed += len(gone)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages in every layer."""
        if len(source) == 0:
            return
        a = torch.from_numpy(source.astype(np.int64)).to(self.spec.device)
        b = torch.from_numpy(target.astype(np.int64)).to(self.spec.device)
        for group in (self.keys,) if self.spec.shared_kv else (self.keys, self.values):
            for region in group:
                region.index_copy_(0, b, region.index_select(0, a))
        self.counters.copied += len(source)

    def grow(self, capacity: int) -> int:
        """Enlarge the pool to `capacity` pages by copying, one layer at a time; return it.

        Views taken before (`keys_values`) keep the old memory alive and see no later writes.
        """
        extra = capacity - self.capacity
        if extra <= 0:
            return self.capacity
        for group in (self.keys,) if self.spec.shared_kv else (self.keys, self.values):
            for layer, old in enumerate(group):
                new = self._region(capacity, old.shape[-1])
                new[: self.capacity] = old
                group[layer] = new
        self.states = np.concatenate([self.states, np.zeros(extra, np.uint8)])
        self.refcounts = np.concatenate([self.refcounts, np.zeros(extra, np.int32)])
        fresh = np.arange(capacity - 1, self.capacity - 1, -1, dtype=np.int32)
        spare = np.empty(capacity, np.int32)
        spare[:extra] = fresh  # below the old ones: freed low pages are taken first
        spare[extra : extra + self._free_count] = self._free[: self._free_count]
        self._free, self._free_count = spare, self._free_count + extra
        self.capacity = capacity
        self.counters.grown += 1
        return capacity

    def check_integrity(self, holders: np.ndarray) -> None:
        """Prove that states, references and the free list tell one story.

        Args:
            holders: how often each page is held, counted by the caller from its tables, `[capacity]`.

        Raises:
            IntegrityError: naming the first page that disagrees.
        """
        free = self._free[: self._free_count]
        listed = np.bincount(free, minlength=self.capacity)
        checks = {
            "is on the free list twice": listed > 1,
            "is FREE but not on the free list": (self.states == PageState.FREE) & (listed == 0),
            "is on the free list but not FREE": (self.states != PageState.FREE) & (listed > 0),
            "is FREE but referenced": (self.states == PageState.FREE) & (self.refcounts != 0),
            "has no reference but is not FREE": (self.states != PageState.FREE)
            & (self.refcounts < 1),
            "has a count that differs from its holders": self.refcounts != holders,
        }
        for what, wrong in checks.items():
            if wrong.any():
                page = int(np.flatnonzero(wrong)[0])
                raise IntegrityError(
                    f"page {page} {what} (state {PageState(self.states[page]).name}, count "
                    f"{self.refcounts[page]}, holders {holders[page]})"
                )
