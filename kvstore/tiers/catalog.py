"""What a directory holds, in memory: which page is in which slot, which slots are free, what is not yet durable."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..errors import IntegrityError, StoreError
from .form import DROPPED, HELD, OPENED, Record
from .order import EvictionOrder

# every opening numbers its pages from a new multiple on: no number is ever used twice
EPOCH = 1 << 32


class Catalog:
    """Keys (the form's digest before the caller's key) to slots.

    A slot is free, claimed (being written), held, or leaving (dropped, its header not yet erased).

    State: not thread-safe; the tier holds its lock around every call.

    Attributes:
        slots: held pages.
        pending: the last change of each slot that the index does not have yet.
        writing: keys that are being written, and the slots they will have.
        lost: slots whose slab is gone.
        num_slots: slots of all slabs that are there.
    """

    def __init__(self, order: EvictionOrder, last_seq: int) -> None:
        self._order = order
        self.slots: dict[bytes, int] = {}
        self.writing: dict[bytes, int] = {}
        self.leaving: set[int] = set()
        self.lost: set[int] = set()
        self.pending: dict[int, Record] = {}
        self.first_seq = self._next_seq = (last_seq // EPOCH + 1) * EPOCH
        self.evicted = 0
        self._free: list[int] = []
        self._seqs = np.zeros(0, np.uint64)
        self._lengths = np.zeros(0, np.int64)
        self.num_slots = 0

    def add_slots(self, slots: range) -> None:
        """More room: a slab's slots, free until `restore` says otherwise."""
        short = slots.stop - len(self._seqs)
        if short > 0:
            self._seqs = np.concatenate([self._seqs, np.zeros(short, np.uint64)])
            self._lengths = np.concatenate([self._lengths, np.zeros(short, np.int64)])
        self.num_slots += len(slots)
        self.lost.difference_update(slots)
        self._free[:0] = reversed(slots)  # the lowest free slot is taken first: runs stay together

    def restore(self, records: Iterable[Record], page_bytes: int) -> int:
        """Take over what recovery found, the oldest first; give how many cannot be."""
        room = set(self._free)
        dropped = 0
        for record in sorted(records, key=lambda record: record.seq):
            if record.slot not in room or not 0 < record.length <= page_bytes:
                dropped += 1
                continue
            if record.key in self.slots:  # an older copy that a crash left
                dropped += 1
                self._order.removed(record.key)
                room.add(self.slots.pop(record.key))
            room.discard(record.slot)
            self._hold(record)
        self._free = [slot for slot in self._free if slot in room]
        return dropped

    def _hold(self, record: Record) -> None:
        slot = record.slot
        self.slots[record.key] = slot
        self._seqs[slot], self._lengths[slot] = record.seq, record.length
        self._order.added(record.key)

    @property
    def num_free(self) -> int:
        """Free slots."""
        return len(self._free)

    def find(self, key: bytes) -> Record | None:
        """Say where a page is."""
        slot = self.slots.get(key)
        return None if slot is None else self._record(key, slot)

    def _record(self, key: bytes, slot: int) -> Record:
        return Record(HELD, slot, int(self._seqs[slot]), int(self._lengths[slot]), key)

    def use(self, key: bytes) -> None:
        """Tell the eviction order that a page was wanted."""
        self._order.used(key)

    def claim(self, key: bytes, length: int) -> Record | None:
        """Take a slot to write a page into, a free one or a victim's.

        Raises:
            StoreError: if the eviction order names a page that is not held.
        """
        if not self._free:
            victim = self._order.victim()
            if victim is None:
                return None
            if victim not in self.slots:
                raise StoreError(
                    f"the eviction order named a page that is not held: {victim.hex()}"
                )
            self._free.append(self._forget(victim))
            self.evicted += 1
        self.writing[key] = slot = self._free.pop()
        self._next_seq += 1
        return Record(HELD, slot, self._next_seq - 1, length, key)

    def _forget(self, key: bytes) -> int:
        slot = self.slots.pop(key)
        self._order.removed(key)
        self.pending[slot] = Record(DROPPED, slot, int(self._seqs[slot]))
        return slot

    def publish(self, record: Record) -> None:
        """A claimed slot was written: the page is held."""
        del self.writing[record.key]
        self._hold(record)
        self.pending[record.slot] = record

    def unclaim(self, record: Record) -> None:
        """A claimed slot was not written, or only in part: it leaves."""
        del self.writing[record.key]
        if record.slot not in self.lost:
            self.leaving.add(record.slot)

    def drop(self, key: bytes, seq: int | None = None) -> int | None:
        """Forget a page (of this number, if given); its slot leaves."""
        slot = self.slots.get(key)
        if slot is None or (seq is not None and int(self._seqs[slot]) != seq):
            return None
        self.leaving.add(self._forget(key))
        return slot

    def free(self, slot: int) -> None:
        """A leaving slot's header is erased: it can be used again."""
        if slot in self.leaving:  # else its slab went meanwhile
            self.leaving.remove(slot)
            self._free.append(slot)

    def lose(self, slots: range) -> int:
        """A slab is gone: forget its slots, whatever state they were in; give how many pages that were."""
        keys = [key for key, slot in self.slots.items() if slot in slots]
        for key in keys:
            self._forget(key)
        self._free = [slot for slot in self._free if slot not in slots]
        self.leaving.difference_update(slots)
        self.lost.update(slots)
        self.num_slots -= len(slots)
        return len(keys)

    def take_pending(self) -> dict[int, Record]:
        """The changes to make durable now."""
        taken, self.pending = self.pending, {}
        return taken

    def put_back(self, records: dict[int, Record]) -> None:
        """Changes that did not become durable, unless newer ones took their place."""
        self.pending = {**records, **self.pending}

    def durable(self) -> list[Record]:
        """All that a new index says: held pages without those still pending, after the opening's number."""
        held = [self._record(key, at) for key, at in self.slots.items() if at not in self.pending]
        return [Record(OPENED, 0, self.first_seq), *sorted(held, key=lambda record: record.seq)]

    def records(self) -> list[Record]:
        """All held pages."""
        return [self._record(key, slot) for key, slot in self.slots.items()]

    def check_integrity(self) -> None:
        """Prove that every slot is in one state and none is lost.

        Raises:
            IntegrityError: naming what does not hold.
        """
        held = list(self.slots.values())
        known = [*held, *self._free, *self.leaving]
        checks = {
            "a slot is in two states": len(set(known)) != len(known),
            "a slot is lost": len(known) + len(set(self.writing.values()) - self.lost)
            != self.num_slots,
            "a held page is also being written": bool(self.writing.keys() & self.slots.keys()),
        }
        for what, wrong in checks.items():
            if wrong:
                raise IntegrityError(f"disk tier: {what}")
