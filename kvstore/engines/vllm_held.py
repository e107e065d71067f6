"""Which pages a tier holds, known without asking it: lookups in a scheduler must not wait for a disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..tiers import Lru, PageForm


class HeldKeys(Lru):
    """An LRU order that also tells what is held, and what came and went.

    A tier calls its order with every page that comes and goes; this one keeps the caller's keys of one form,
    so that `key in held` needs no lock and no disk. A page is in it from its write on, before it is durable.

    Attributes:
        changed: keys that came or went since the list was last emptied.
    """

    def __init__(self, form: PageForm) -> None:
        super().__init__()
        self._prefix = form.digest()
        self._keys: set[bytes] = set()
        self._touched: deque[bytes] = deque(maxlen=1 << 16)
        self.changed: deque[bytes] = deque()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[bytes]:
        """All keys held now."""
        return list(self._keys)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Pages were wanted; taken into account when a victim is sought."""
        self._touched.extend(self._prefix + key for key in keys)

    def added(self, key: bytes) -> None:
        """A page came."""
        super().added(key)
        if key.startswith(self._prefix):
            self._keys.add(key[len(self._prefix) :])
            self.changed.append(key[len(self._prefix) :])

    def removed(self, key: bytes) -> None:
        """A page went."""
        super().removed(key)
        if key.startswith(self._prefix):
            self._keys.discard(key[len(self._prefix) :])
            self.changed.append(key[len(self._prefix) :])

    def victim(self) -> bytes | None:
        """Name the page that was not used for longest."""
        while self._touched:
            key = self._touched.popleft()
            if key in self._order:
                self.used(key)
        return super().victim()
