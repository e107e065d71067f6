"""Which page a full tier forgets next: the contract, and the two orders that need no history."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class EvictionOrder(Protocol):
    """Told of every page that comes, is used and goes; asked for one to forget.

    The tier calls it under its lock, so it needs none. Keys are opaque: they are not the caller's.
    """

    def added(self, key: bytes) -> None:
        """A page came."""

    def used(self, key: bytes) -> None:
        """A page was read, or put again."""

    def removed(self, key: bytes) -> None:
        """A page went, for whatever reason; also after `victim` named it."""

    def victim(self) -> bytes | None:
        """Name the page to forget next, or None to keep them all and refuse the new one."""


class Fifo:
    """The page that came first goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes) -> None:
        """Queue it last."""
        self._order[key] = None

    def used(self, key: bytes) -> None:
        """Change nothing."""

    def removed(self, key: bytes) -> None:
        """Take it out of the queue."""
        self._order.pop(key, None)

    def victim(self) -> bytes | None:
        """Name the first of the queue."""
        return next(iter(self._order), None)


class Lru(Fifo):
    """The page that was not used for longest goes first."""

    def used(self, key: bytes) -> None:
        """Queue it last again."""
        self._order.move_to_end(key)
