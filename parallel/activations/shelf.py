"""A shelf for saved activations: a tier of the store, written behind forward and read ahead of backward."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kvstore.tiers import Fifo, Move, Moves, Page, Tier, TierError, TierWrapper
from .saved import CHANGED, Group

THREADS = 2


@dataclass
class Counters:
    """What a shelf has done.

    Attributes:
        written_bytes: went to the tier; ``read_bytes`` came back.
        taken_back_bytes: were needed again before they were written.
        early: reads begun before their tensors were needed; ``late``: begun when they were.
        held_bytes: in memory now, to be written or just read; ``most_bytes`` is the most at a time.
        waited_seconds: forward waited for room and backward for reads.
    """

    written_bytes: int = 0
    read_bytes: int = 0
    taken_back_bytes: int = 0
    early: int = 0
    late: int = 0
    held_bytes: int = 0
    most_bytes: int = 0
    waited_seconds: float = 0.0


class Keep(Fifo):
    """An eviction order that forgets nothing: a full tier refuses."""

    def victim(self) -> bytes | None:
        """Name none."""
        return None


class Scratch(TierWrapper):
    """A tier whose pages need not outlive the process: no commits, and what is not wanted goes before new pages come.

    ``unwanted`` takes keys from anywhere, also from a destructor that must not wait for the tier's lock.
    """

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.unwanted: deque[bytes] = deque()

    def put(self, keys: Sequence[bytes], pages: Sequence[Page]) -> list[bool]:
        """Keep pages in the room of unwanted ones."""
        self.sweep()
        return super().put(keys, pages)

    def sweep(self) -> None:
        """Forget the unwanted."""
        gone: list[bytes] = []
        with contextlib.suppress(IndexError):
            while True:
                gone.append(self.unwanted.popleft())
        self.inner.remove(gone)

    def commit(self) -> None:
        """Do nothing."""


class Slot:
    """One storage on a shelf, for all tensors that are views of it.

    ``source`` is there until the bytes are in the tier; ``back`` from when they are read until every tensor that was
    saved has been taken once. When nobody holds the slot any more its pages are unwanted.
    """

    def __init__(self, shelf: Shelf, x: Tensor) -> None:
        self.shelf, self.device = shelf, x.device
        self.size = x.untyped_storage().nbytes()
        self.version = x._version
        # Detached: a saved output must not hold the graph that holds it.
        self.source: Tensor | None = x.detach()
        self.back: tuple[Move, Tensor] | None = None
        self.uses = self.left = 0
        self.changed = False
        pages = range(0, self.size, shelf.page_bytes)
        self.keys = [next(shelf.numbers).to_bytes(8, "little") for _ in pages]
        self.spans = [slice(at, min(at + shelf.page_bytes, self.size)) for at in pages]
        self.stored: Move | None = None

    def __del__(self) -> None:
        if self.stored is not None:
            self.stored.cancel()
        if self.source is not None or self.back is not None:
            self.shelf.hold(-self.size)
        self.shelf.tier.unwanted.extend(self.keys)


class Shelf:
    """Puts storages of saved tensors into a tier and brings them back, bitwise.

    Memory beside the model's: at most ``queue_bytes`` that wait to be written, what was kept, and what was read ahead.

    State: the threads of `Moves`, until `close`.
    """

    def __init__(self, tier: Tier, page_bytes: int, queue_bytes: int, where: str) -> None:
        self.tier, self.page_bytes, self.where = Scratch(tier), page_bytes, where
        self.counters = Counters()
        self.numbers = itertools.count()
        self._moves = Moves(self.tier, threads=THREADS, queue_bytes=queue_bytes)
        self._failure: BaseException | None = None
        self._lock = threading.RLock()  # a destructor may interrupt who holds it
        self._room, self._most, self._on_the_way = threading.Condition(self._lock), queue_bytes, 0

    def put(self, x: Tensor, group: Group) -> Slot:
        """Begin to write a tensor's storage.

        Raises:
            TierError: something put before could not be written.
        """
        self.check()
        with self._waiting():
            self._wait_for_room(x.untyped_storage().nbytes())
        slot = Slot(self, x)
        raw = whole_storage(x).to("cpu")
        self.hold(slot.size)
        pages = [raw[span] for span in slot.spans]
        with self._waiting():
            move = self._moves.store(slot.keys, pages, then=self._written(slot))
        slot.stored = move  # which sees the memory, and so keeps it
        if move.done:
            slot.stored = None
        return slot

    def _wait_for_room(self, size: int) -> None:
        """Wait until so many bytes more may be on the way.

        `Moves` bounds what waits for a transfer; we also what waits for its commit, for until then it is in memory.
        """
        with self._room:
            self._room.wait_for(
                lambda: not self._on_the_way or self._on_the_way + size <= self._most
            )
            self._on_the_way += size

    def _written(self, slot: Slot) -> Any:
        """What to do when a slot's bytes are in the tier, without holding the slot until then."""
        known = weakref.ref(slot)
        keys, size = slot.keys, slot.size

        def then(move: Move) -> None:
            settled(move)
            with self._room:
                self._on_the_way -= size
                self._room.notify_all()

        def settled(move: Move) -> None:
            slot = known()
            if slot is None:
                self.tier.unwanted.extend(keys)  # those that came after the slot had gone
                return
            try:
                move.wait(0)
                if not all(move.held):
                    self._failure = TierError(
                        f"activations: {self.where} has no room for {size:,} more bytes; give it more, move less by "
                        "a larger least_bytes, or use activation checkpointing too"
                    )
                    return
            except Exception as error:
                self._failure = error
                return
            source, slot.source, slot.stored = slot.source, None, None
            slot.changed = source is not None and source._version != slot.version
            self.counters.written_bytes += size
            self.hold(-size)

        return then

    def hold(self, count: int) -> None:
        """Note bytes that came into memory, or left it."""
        with self._lock:
            self.counters.held_bytes += count
            self.counters.most_bytes = max(self.counters.most_bytes, self.counters.held_bytes)

    def check(self) -> None:
        """Raise what went wrong behind the caller's back, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def expect(self, slot: Slot) -> bool:
        """Begin to read a slot, unless it is in memory; say whether that was so."""
        if slot.source is not None or slot.back is not None:
            return False
        raw = torch.empty(slot.size, dtype=torch.uint8)
        self.hold(slot.size)
        self.counters.read_bytes += slot.size
        with self._waiting():
            slot.back = self._moves.load(slot.keys, [raw[span] for span in slot.spans]), raw
        return True

    def reach(self, group: Group) -> None:
        """Read what a group and the one before it have on the shelf, in the order backward will want it."""
        for each in (group, group.before):
            for known in reversed(each.slots if each is not None else []):
                slot = known()
                if slot is not None:
                    self.counters.early += self.expect(slot)

    def take(self, slot: Slot, group: Group) -> Tensor:
        """Give a slot's bytes, all of its storage.

        Shape: [bytes], uint8, on the device it was on

        Raises:
            RuntimeError: they are lost, or the tensor was changed in place after it was saved.
        """
        self.check()
        source = slot.source
        if source is not None:
            slot.changed |= source._version != slot.version
            self.counters.taken_back_bytes += slot.size
            return self._used(slot, whole_storage(source))
        self.counters.late += self.expect(slot)
        assert slot.back is not None
        move, raw = slot.back
        with self._waiting():
            move.wait()
        if not all(move.held):
            raise RuntimeError(
                f"an activation of {slot.size:,} bytes that backward needs is lost or damaged in {self.where}; "
                "no gradient can be computed from it"
            )
        return self._used(slot, raw.to(slot.device))

    def _used(self, slot: Slot, raw: Tensor) -> Tensor:
        if slot.changed:
            raise RuntimeError(CHANGED)
        slot.left -= 1
        if slot.left <= 0:
            slot.left = slot.uses
            if slot.back is not None:
                slot.back = None
                self.hold(-slot.size)
        return raw

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.counters.waited_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Finish what is under way, and let go of the tier."""
        self._moves.close()
        self.tier.sweep()
        self.tier.close()


def whole_storage(x: Tensor) -> Tensor:
    """See the storage that a tensor is a view of.

    Shape: any -> [bytes], uint8
    """
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
