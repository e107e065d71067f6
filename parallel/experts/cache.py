"""Experts' weights that are fetched when they are needed: least recently used leave first, expected ones come early."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

Key = tuple[str, int]  # path of the layer's experts, number of the expert
Weights = dict[str, Tensor]
Fetch = Callable[[Key], Weights]


@dataclass
class Counters:
    """What a cache has done.

    Attributes:
        hits: experts that were there when they were needed, or asked for early and still on their way.
        misses: experts that were fetched when they were needed.
        early: experts that were fetched before they were needed, ``wasted`` those of them that left unused.
        fetched_bytes: bytes that came from host or disk.
        most_bytes: the most that was held at a time.
    """

    hits: int = 0
    misses: int = 0
    early: int = 0
    wasted: int = 0
    evictions: int = 0
    fetched_bytes: int = 0
    most_bytes: int = 0


class ExpertCache:
    """Weights of experts in device memory, at most ``capacity`` bytes of them.

    One thread fetches what is expected; who needs an expert that is on its way waits for it. Called by one thread.

    State: the weights held, and a thread until `close`.
    """

    def __init__(self, fetch: Fetch, capacity: int, sizes: dict[str, int]) -> None:
        self.capacity, self.sizes = capacity, sizes
        self.counters = Counters()
        self._fetch = fetch
        self._held: OrderedDict[Key, Weights | Future[Weights]] = OrderedDict()
        self._unused: set[Key] = set()
        self._bytes = 0
        self._thread = ThreadPoolExecutor(1, "experts")

    def get(self, key: Key) -> Weights:
        """The weights of an expert that is needed now."""
        found = self._held.get(key)
        if found is None:
            self.counters.misses += 1
            self._make_room(key)
            found = self._keep(key, self._fetch(key))
        else:
            self.counters.hits += 1
            self._unused.discard(key)
            self._held.move_to_end(key)
            if isinstance(found, Future):
                found = self._held[key] = found.result()
        assert isinstance(found, dict)
        return found

    def expect(self, keys: Iterable[Key], needed: Iterable[Key] = ()) -> None:
        """Begin to fetch experts that may be needed soon, as far as there is room beside those needed now."""
        needed = list(needed)
        now = [key for key in needed if key in self._held]
        room = self.capacity - sum(self.sizes[path] for path, _ in needed)
        for key in keys:
            room -= self.sizes[key[0]]
            if room < 0:
                return
            if key in self._held:
                continue
            for held in now:
                self._held.move_to_end(held)
            self._make_room(key)
            self.counters.early += 1
            self._unused.add(key)
            self._keep(key, self._thread.submit(self._fetch, key))

    def close(self) -> None:
        """Forget everything, and end the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._held.clear()
        self._bytes = 0

    def _keep(self, key: Key, weights: Weights | Future[Weights]) -> Weights | Future[Weights]:
        self._held[key] = weights
        self._bytes += self.sizes[key[0]]
        self.counters.fetched_bytes += self.sizes[key[0]]
        self.counters.most_bytes = max(self.counters.most_bytes, self._bytes)
        return weights

    def _make_room(self, key: Key) -> None:
        while self._bytes + self.sizes[key[0]] > self.capacity:
            old, weights = self._held.popitem(last=False)
            if isinstance(weights, Future) and not weights.cancel():
                weights.result()  # it is being written: its memory is not free before
            self._bytes -= self.sizes[old[0]]
            self.counters.evictions += 1
            if old in self._unused:
                self._unused.discard(old)
                self.counters.wasted += 1
