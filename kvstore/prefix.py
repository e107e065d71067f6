"""The prefix index: which pages hold the keys and values of which token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import chains
from .chains import CHILDREN, PARENT, ROOT
from .errors import IntegrityError
from .extents import HOLDERS, PROMISED
from .pool import PagePool
from .tokens import History, digest_words, page_hasher, update

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Match:
    """The longest cached prefix of some token ids.

    Attributes:
        pages: its pages; the last may hold more tokens than match.
        tokens: its length.
        full_pages: pages that match whole.
        hasher: the prefix hash after the full pages, None if it has to be made again.
    """

    pages: np.ndarray
    tokens: int
    full_pages: int
    hasher: Any


class PrefixIndex:
    """Finds the pages of a prefix by the keyed hash of all its tokens, and proves it by the ids.

    A page's digest covers every token from the start of the sequence, so the cached prefixes of a
    tenant are trees of pages. A page is never indexed without its parent: the longest match is found
    by doubling and halving, with a handful of digests instead of one for each page.

    State: not thread-safe; the store holds its lock around every call. See `chains` for the arrays.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.size = pool.spec.page_tokens
        self.collisions = 0
        self._numbers: dict[bytes, int] = {}
        self._keys: list[bytes | None] = []
        self._spare: list[int] = []
        self._roots = np.zeros((2, 0), np.int32)
        self.digests = np.zeros((0, 4), np.uint64)
        self.ids = np.zeros((0, self.size), np.int32)
        self.links = np.zeros((6, 0), np.int32)
        self._table = np.zeros(0, np.int32)
        self.resize()

    def resize(self) -> None:
        """Follow the pool's growth."""
        old, capacity = len(self.ids), self.pool.capacity
        extra = capacity - old
        self.digests = np.concatenate([self.digests, np.zeros((extra, 4), np.uint64)])
        self.ids = np.concatenate([self.ids, np.zeros((extra, self.size), np.int32)])
        self.links = np.concatenate([self.links, np.zeros((6, extra), np.int32)], 1)
        room = 1 << (2 * capacity - 1).bit_length()
        if room > len(self._table):
            self._table = np.full(room, -1, np.int32)
            for page in np.flatnonzero(self.pool.promised[:old] == self.size):
                chains.enter(self._table, self.digests, page)

    @property
    def _arrays(self) -> _Arrays:
        return (self._table, self.digests, self.ids, self.links, self._roots, self.pool.meta)

    # -- finding -----------------------------------------------------------------------------

    def match(self, key: bytes, ids: np.ndarray, most: int) -> Match:
        """Find the longest indexed prefix of at most `most` tokens."""
        full, page, hasher = self._deepest(key, ids, most // self.size)
        root = self._numbers.get(key, -1)
        pages = np.empty(full, np.int32)
        want = ids[: full * self.size].reshape(full, self.size)
        right = chains.walk(self.links, self.ids, page, root, want, pages) if full else 0
        if right < full:  # equal hashes of different tokens: believe what was compared
            self.collisions += 1
            full, pages, hasher = right, pages[:right], None
        rest = ids[full * self.size : min(most, (full + 1) * self.size)]
        parent = int(pages[-1]) if full else -1
        child, tokens = chains.best_child(
            self.links, self._roots, self.pool.meta, self.ids, parent, root, rest
        )
        if tokens:
            pages = np.append(pages, np.int32(child))
        return Match(pages, full * self.size + tokens, full, hasher)

    def _deepest(self, key: bytes, ids: np.ndarray, most: int) -> tuple[int, int, Any]:
        """Find how many full pages are indexed: (pages, the last of them, hash after them)."""
        low, page, hasher = 0, -1, page_hasher(key)
        high, step = most + 1, 1
        while low + 1 < high:
            probe = min(low + step, most) if step else (low + high) // 2
            ahead = hasher.copy()
            update(ahead, ids[low * self.size : probe * self.size])
            found = int(chains.find(self._table, self.digests, digest_words(ahead)))
            if found >= 0:
                low, page, hasher = probe, found, ahead
                step *= 2
            else:
                high, step = probe, 0
        return low, page, hasher

    # -- changing ----------------------------------------------------------------------------

    def extend(self, history: History, pages: np.ndarray, stop: int) -> np.ndarray:
        """Index the full pages `history.indexed` to `stop` of a sequence.

        Returns the pages of the index that hold those tokens: the sequence's own, or those that
        were there before. Fewer than asked if a hash belongs to other tokens.
        """
        first, size = history.indexed, self.size
        mine, parent = pages[first:stop], int(pages[first - 1]) if first else -1
        settled = np.empty(len(mine), np.int32)
        root = self._root(history.key)
        words = history.digests(first, stop)
        ids = history.ids[first * size : stop * size].reshape(-1, size)
        done = chains.extend(*self._arrays, parent, root, mine, words, ids, settled)
        if done < len(mine):
            self.collisions += 1
        history.indexed = first + done
        self._drop_root(history.key)
        return settled[:done]

    def add_partial(self, history: History, pages: np.ndarray, tokens: int) -> bool:
        """Index the first `tokens` of a sequence's last page, if nothing there says them already."""
        full, page = history.indexed, int(pages[-1])
        parent = int(pages[full - 1]) if full else -1
        ids = history.ids[full * self.size : full * self.size + tokens]
        root = self._root(history.key)
        meta, links = self.pool.meta, self.links
        _, known = chains.best_child(links, self._roots, meta, self.ids, parent, root, ids)
        added = known < tokens
        if added:
            if not meta[PROMISED, page]:
                chains.adopt(links, self._roots, page, parent, root)
            self.ids[page, :tokens] = ids
            self.digests[page] = history.digests(full, full, tokens)[-1]
            meta[PROMISED, page] = tokens
        self._drop_root(history.key)
        return added

    def remove(self, pages: np.ndarray) -> int:
        """Forget pages, successors before their parents.

        Returns how many: it stops at a page that is held, not indexed, or followed by one that is.
        """
        owners = set(self.links[ROOT, pages].tolist())
        bad = int(chains.remove(*self._arrays, pages))
        for number in owners:
            key = self._keys[number]
            if key is not None:
                self._drop_root(key)
        return len(pages) if bad < 0 else bad

    def _root(self, key: bytes) -> int:
        number = self._numbers.get(key)
        if number is None:
            if not self._spare:
                count = len(self._keys)
                self._spare = list(range(2 * count + 7, count - 1, -1))
                self._keys += [None] * len(self._spare)
                self._roots = np.concatenate([self._roots, np.zeros((2, count + 8), np.int32)], 1)
                self._roots[0, count:] = -1
            number = self._spare.pop()
            self._keys[number] = key
            self._numbers[key] = number
            self._roots[:, number] = (-1, 0)
        return number

    def _drop_root(self, key: bytes) -> None:
        number = self._numbers[key]
        if self._roots[1, number] == 0:
            del self._numbers[key]
            self._keys[number] = None
            self._spare.append(number)

    # -- proof -------------------------------------------------------------------------------

    @property
    def tenants(self) -> int:
        """Tenants that have a page in the index."""
        return len(self._numbers)

    def check_integrity(self) -> None:
        """Prove that table, trees and promises tell one story.

        Raises:
            IntegrityError: naming the first page that disagrees.
        """
        meta, links = self.pool.meta, self.links
        indexed = np.flatnonzero(meta[PROMISED])
        full = indexed[meta[PROMISED, indexed] == self.size]
        parents = links[PARENT, indexed]
        below = indexed[parents >= 0]
        over = links[PARENT, below]
        children = np.bincount(over, minlength=self.pool.capacity)
        checks = {
            "is indexed but cannot be found": full[
                [chains.find(self._table, self.digests, self.digests[p]) != p for p in full]
            ],
            "follows a page that is not full": below[meta[PROMISED, over] != self.size],
            "follows a page of another tenant": below[links[ROOT, over] != links[ROOT, below]],
            "is held although its parent is not": below[
                (meta[HOLDERS, below] > 0) & (meta[HOLDERS, over] == 0)
            ],
            "has a wrong count of children": indexed[links[CHILDREN, indexed] != children[indexed]],
        }
        for what, wrong in checks.items():
            if len(wrong):
                raise IntegrityError(f"page {wrong[0]} {what}")
        if (self._table >= 0).sum() != len(full):
            raise IntegrityError("the prefix table names a page that is not indexed")
        pages_of = np.bincount(links[ROOT, indexed], minlength=len(self._keys))
        if not np.array_equal(pages_of[: len(self._keys)], self._roots[1]):
            raise IntegrityError("the pages of a tenant are miscounted")
        self._check_lists(indexed)

    def _check_lists(self, indexed: np.ndarray) -> None:
        """Every indexed page hangs in its parent's list, once."""
        links, seen = self.links, []
        heads = [int(head) for head in self._roots[0]] + links[chains.CHILD, indexed].tolist()
        for head in heads:
            page, before = head, -1
            while page >= 0 and len(seen) <= len(indexed):
                if links[chains.BACK, page] != before:
                    raise IntegrityError(f"page {page} hangs in no list of siblings")
                seen.append(page)
                page, before = int(links[chains.NEXT, page]), page
        if sorted(seen) != indexed.tolist():
            raise IntegrityError("the lists of siblings differ from the pages that are indexed")
