"""Errors of the store: what was asked, why it cannot be, what would do."""

from __future__ import annotations


class StoreError(Exception):
    """Any error the store raises on purpose."""


class PoolExhausted(StoreError, RuntimeError):
    """No pages left. Carries the counts an eviction or a scheduler needs."""

    def __init__(self, needed: int, free: int, pinned: int, capacity: int) -> None:
        self.needed, self.free, self.pinned, self.capacity = needed, free, pinned, capacity
        super().__init__(
            f"{needed} pages needed, {free} free or evictable ({pinned} in use of {capacity}); close "
            "sequences, or give the store more device_bytes or grow=True"
        )


class SequenceClosed(StoreError, ValueError):
    """A closed sequence was used."""


class StepError(StoreError, ValueError):
    """A step was used out of order: written after commit, or two steps open on one sequence."""


class IntegrityError(StoreError, AssertionError):
    """An invariant of the store does not hold; a bug in the store, never the caller's fault."""
