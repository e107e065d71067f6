"""Pages of one KV head: what each head of each layer of a sequence kept, as many tokens as it likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import PoolExhausted
from ..pool import PagePool
from ..spec import KVSpec
from ..table import PageTable


@dataclass
class Lanes:
    """One layer of one sequence: a list of pages for each KV head, which keeps `counts[head]` tokens.

    Shape: pages `[kv_heads, most]` int32, of which the first `ceil(count / page_tokens)` of a row are in use;
        counts `[kv_heads]` int64.
    """

    pages: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, kv_heads: int) -> Lanes:
        """Lanes without tokens."""
        return cls(np.zeros((kv_heads, 0), np.int32), np.zeros(kv_heads, np.int64))


class LanePool:
    """The pages of all lanes, and for each token its place in the text (and the attention it received).

    Shape: pool.keys[0] `[pages, page_tokens, 1, head_dim]`; places `[pages, page_tokens]` int32, local to this rank;
        received likewise float32, or None.

    State: not thread-safe; the store holds its lock around every call.
    """

    def __init__(self, spec: KVSpec, num_pages: int, max_pages: int | None, received: bool) -> None:
        self.size, self.max_pages = spec.page_tokens, max_pages
        self.pool = PagePool(spec, num_pages)
        self.places = np.zeros((num_pages, self.size), np.int32)
        self.received = torch.zeros(num_pages, self.size) if received else None
        self.peak_pages = 0
        self.spare: Callable[[], bool] = lambda: False  # gives pages back that nobody needs

    @property
    def bytes_per_page(self) -> int:
        """Keys, values and what stands beside them."""
        beside = 4 if self.received is None else 8
        return self.pool.spec.bytes_per_page + beside * self.size

    def take(self, count: int) -> np.ndarray:
        """Take pages, growing the pool by a quarter and what is needed if too few are free.

        Raises:
            PoolExhausted: if the pool may not grow so far.
        """
        pool, short = self.pool, count - self.pool.free_pages
        if short > 0:
            want = pool.capacity + max(short, pool.capacity // 4)
            if self.max_pages is not None:
                want = min(want, self.max_pages)
            while want - pool.capacity < count - pool.free_pages and self.spare():
                pass
            if want - pool.capacity < count - pool.free_pages:
                raise PoolExhausted(count, pool.free_pages, pool.held_pages, pool.capacity)
            extra = want - pool.capacity
            pool.grow(want)
            self.places = np.concatenate([self.places, np.zeros((extra, self.size), np.int32)])
            if self.received is not None:
                self.received = torch.cat([self.received, torch.zeros(extra, self.size)])
        pages = pool.allocate(np.array([count]), np.array([-1]))
        pool.commit(pages)
        self.peak_pages = max(self.peak_pages, pool.held_pages)
        return pages

    def held(self, lanes: Lanes) -> np.ndarray:
        """All pages of a layer's lanes, head after head."""
        return np.concatenate([self.row(lanes, head) for head in range(len(lanes.counts))])

    def row(self, lanes: Lanes, head: int) -> np.ndarray:
        """The pages of one head."""
        return lanes.pages[head, : -(-int(lanes.counts[head]) // self.size)]

    def release(self, lanes: Lanes) -> None:
        """Give the pages back."""
        self.pool.release(self.held(lanes))

    def share(self, lanes: Lanes) -> Lanes:
        """Give lanes that hold the same pages."""
        self.pool.share(self.held(lanes))
        return Lanes(lanes.pages.copy(), lanes.counts.copy())

    def slots(self, lanes: Lanes, index: np.ndarray) -> np.ndarray:
        """Rows of tokens in a flat region. Shape: index `[kv_heads, n]` -> `[kv_heads, n]` int64."""
        page = np.take_along_axis(lanes.pages, index // self.size, 1).astype(np.int64)
        return page * self.size + index % self.size

    def append(self, lanes: Lanes, k: Tensor, v: Tensor, places: np.ndarray) -> None:
        """Add the same number of tokens to every head; a shared last page is copied first.

        Shape: k `[tokens, kv_heads, head_dim]`, v likewise, places `[tokens]`.
        """
        count = len(places)
        if count == 0:
            return
        self._extend(lanes, np.full(len(lanes.counts), count))
        slots = self.slots(lanes, lanes.counts[:, None] + np.arange(count))
        self._write(slots.ravel(), k.transpose(0, 1).flatten(0, 1), v.transpose(0, 1).flatten(0, 1))
        self.places.reshape(-1)[slots] = places
        if self.received is not None:
            self.received.view(-1)[torch.from_numpy(slots)] = 0
        lanes.counts = lanes.counts + count

    def fill(
        self, k: list[Tensor], v: list[Tensor], places: list[np.ndarray],
        received: list[Tensor] | None = None,
    ) -> Lanes:  # fmt: skip
        """Make lanes of what each head keeps. Shape: k `[kv_heads]` of `[count, head_dim]`, ..."""
        lanes = Lanes.empty(len(places))
        counts = np.array([len(own) for own in places])
        self._extend(lanes, counts)
        slots = np.concatenate(
            [
                self.row_slots(lanes.pages[head], np.arange(count))
                for head, count in enumerate(counts)
            ]
        )
        self._write(slots, torch.cat(k), torch.cat(v))
        self.places.reshape(-1)[slots] = np.concatenate(places)
        if self.received is not None:
            heard = 0 if received is None else torch.cat(received).float()
            self.received.view(-1)[torch.from_numpy(slots)] = heard
        lanes.counts = counts.astype(np.int64)
        return lanes

    def read(self, lanes: Lanes, head: int) -> tuple[Tensor, Tensor, np.ndarray, Tensor | None]:
        """Copy one head's tokens out: keys `[count, d]`, values, places, attention received."""
        slots = self.row_slots(lanes.pages[head], np.arange(lanes.counts[head]))
        at = torch.from_numpy(slots)
        k, v = (region[0].flatten(0, 2)[at] for region in (self.pool.keys, self.pool.values))
        heard = None if self.received is None else self.received.view(-1)[at]
        return k, v, self.places.reshape(-1)[slots], heard

    def table(self, lanes: list[Lanes]) -> PageTable:
        """The pages of some sequences' heads: lane `s * kv_heads + h`."""
        rows = [self.row(own, head) for own in lanes for head in range(len(own.counts))]
        counts = np.concatenate([own.counts for own in lanes])
        return PageTable(rows, counts, self.size)

    def cut(self, lanes: Lanes, place: int) -> None:
        """Forget tokens from a place of the text on."""
        old = [self.row(lanes, head) for head in range(len(lanes.counts))]
        counts = lanes.counts.copy()
        for head, count in enumerate(lanes.counts):
            own = self.places.reshape(-1)[self.row_slots(lanes.pages[head], np.arange(count))]
            counts[head] = np.searchsorted(own, place)
        lanes.counts = counts
        for head, pages in enumerate(old):
            self.pool.release(pages[len(self.row(lanes, head)) :])

    def leave(self, lanes: Lanes, place: int) -> bool:
        """Forget whole pages of tokens before a place of the text; say whether there were any."""
        first = lanes.pages[:, :1]
        if not first.size or (self.places[first[:, 0], -1] >= place).all():
            return False
        gone = np.zeros(len(lanes.counts), np.int64)
        for head, count in enumerate(lanes.counts):
            own = self.places[self.row(lanes, head)].ravel()[:count]
            gone[head] = np.searchsorted(own, place) // self.size
        left, pages = lanes.counts - gone * self.size, lanes.pages
        for head, n in enumerate(gone):
            self.pool.release(pages[head, :n])
            pages[head, : pages.shape[1] - n] = pages[head, n:].copy()
        lanes.counts = left
        return bool(gone.any())

    def row_slots(self, pages: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Rows of one head's tokens in a flat region. Shape: `[n]` -> `[n]` int64"""
        return pages[index // self.size].astype(np.int64) * self.size + index % self.size

    def _write(self, slots: np.ndarray, k: Tensor, v: Tensor) -> None:
        at = torch.from_numpy(slots).to(k.device)
        for region, rows in ((self.pool.keys[0], k), (self.pool.values[0], v)):
            region.flatten(0, 2).index_copy_(0, at, rows)

    def _extend(self, lanes: Lanes, more: np.ndarray) -> None:
        """Give every head room for more tokens of its own."""
        have, need = (-(-n // self.size) for n in (lanes.counts, lanes.counts + more))
        heads = np.flatnonzero(lanes.counts % self.size)
        lasts = lanes.pages[heads, have[heads] - 1] if len(heads) else np.empty(0, np.int32)
        copy = self.pool.refcounts[lasts] > 1
        heads, lasts = heads[copy], lasts[copy]
        fresh = self.take(int((need - have).sum()) + len(lasts))
        if len(lasts):
            own = fresh[: len(lasts)]
            self.pool.copy(lasts, own)
            self.places[own] = self.places[lasts]
            if self.received is not None:
                self.received[own.tolist()] = self.received[lasts.tolist()]
            lanes.pages[heads, have[heads] - 1] = own
            self.pool.release(lasts)
        most = int(need.max(initial=0))
        pages = np.zeros((len(have), max(most, lanes.pages.shape[1])), np.int32)
        pages[:, : lanes.pages.shape[1]] = lanes.pages
        room = np.arange(pages.shape[1])
        pages[(room >= have[:, None]) & (room < need[:, None])] = fresh[len(lasts) :]
        lanes.pages = pages
