"""Conformance: what every tier must do. Subclass, say how to make one, and let pytest run it:

class TestMyTier(TierConformance):
    def make_tier(self, tmp_path): return MyTier(...)

Needs pytest.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from .errors import TierClosed
from .tier import Tier


def sample(number: int, length: int) -> tuple[bytes, np.ndarray]:
    """Make a key and its page; the same every time."""
    draws = np.random.default_rng(number)
    return draws.bytes(32), draws.integers(0, 256, length, dtype=np.uint8)


class TierConformance:
    """The contract of `Tier`, as tests. A tier under test holds at least 8 pages of `page_bytes`."""

    page_bytes = 3000

    def make_tier(self, tmp_path: Path) -> Tier:
        """Make the empty tier under test."""
        raise NotImplementedError

    @pytest.fixture
    def tier(self, tmp_path: Path):
        """The tier, closed afterwards."""
        tier = self.make_tier(tmp_path)
        yield tier
        tier.close()

    def samples(self, count: int, first: int = 0) -> tuple[list[bytes], list[np.ndarray]]:
        """Pages of different lengths, the largest first."""
        made = [sample(first + i, self.page_bytes - 7 * i) for i in range(count)]
        return [key for key, _ in made], [page for _, page in made]

    def buffers(self, count: int) -> list[np.ndarray]:
        """Room for the largest pages."""
        return [np.zeros(self.page_bytes, np.uint8) for _ in range(count)]

    def test_what_was_put_is_read(self, tier: Tier) -> None:
        """Also in another order, and in another batch."""
        keys, pages = self.samples(6)
        assert tier.put(keys, pages) == [True] * 6
        assert tier.contains([*keys, b"other"]) == [True] * 6 + [False]
        tier.commit()
        out = self.buffers(7)
        found = tier.get([*keys[::-1], b"other"], out)
        assert found == [*(page.size for page in pages[::-1]), None]
        for page, buffer in zip(pages[::-1], out, strict=False):
            assert np.array_equal(buffer[: page.size], page)

    def test_pages_are_immutable(self, tier: Tier) -> None:
        """A put under a held key keeps the first page, also within a batch; after remove a new one."""
        (key,), (page,) = self.samples(1)
        other = page ^ 255
        assert tier.put([key, key], [page, other]) == [True, True]
        assert tier.put([key], [other]) == [True]
        out = self.buffers(1)
        assert tier.get([key], out) == [page.size]
        assert np.array_equal(out[0], page)
        assert tier.remove([key]) == [True]
        assert tier.put([key], [other]) == [True]
        assert tier.get([key], out) == [page.size]
        assert np.array_equal(out[0], other)

    def test_removed_is_gone(self, tier: Tier) -> None:
        """Once, and the room can be used again."""
        for turn in range(20):
            keys, pages = self.samples(4, first=4 * turn)
            assert tier.put(keys, pages) == [True] * 4
            assert tier.remove([*keys, keys[0]]) == [True] * 4 + [False]
            assert tier.contains(keys) == [False] * 4
            assert tier.get(keys, self.buffers(4)) == [None] * 4

    def test_memory_of_every_kind(self, tier: Tier) -> None:
        """Bytes, bytearrays, arrays and tensors, in and out."""
        tensor = torch.arange(200, dtype=torch.bfloat16).reshape(2, 100)
        array = np.arange(50, dtype=np.float64)
        tier.put([b"t", b"a", b"b"], [tensor, array, b"12345"])
        into, room, small = torch.zeros_like(tensor), np.zeros_like(array), bytearray(5)
        assert tier.get([b"t", b"a", b"b"], [into, room, memoryview(small)]) == [400, 400, 5]
        assert torch.equal(into, tensor)
        assert np.array_equal(room, array)
        assert small == b"12345"

    def test_empty_batches(self, tier: Tier) -> None:
        """Nothing in, nothing out."""
        assert tier.put([], []) == tier.get([], []) == tier.contains([]) == tier.remove([]) == []
        tier.commit()

    def test_bad_input_is_refused(self, tier: Tier) -> None:
        """With nothing kept of the batch."""
        keys, pages = self.samples(2)
        wide = np.zeros((40, 40), np.uint8)
        for bad_keys, bad_pages in (
            (keys, pages[:1]),
            ([keys[0], b""], pages),
            ([keys[0], b"k" * 65], pages),
            ([keys[0], "text"], pages),
            (keys, [pages[0], b""]),
            (keys, [pages[0], wide[:, ::2]]),
            (keys, [pages[0], torch.zeros(4, 4).t()[1:]]),
            (keys, [pages[0], np.zeros(self.page_bytes + 1, np.uint8)]),
        ):
            with pytest.raises(ValueError):
                tier.put(bad_keys, bad_pages)  # type: ignore[arg-type]
        assert tier.contains(keys) == [False, False]
        tier.put(keys, pages)
        for out in ([pages[0], bytes(self.page_bytes)], [np.zeros(1, np.uint8), *self.buffers(1)]):
            with pytest.raises(ValueError):
                tier.get(keys, out)

    def test_counters_are_numbers(self, tier: Tier) -> None:
        """By name."""
        assert all(isinstance(value, int | float) for value in tier.counters().values())

    def test_closed_is_closed(self, tier: Tier) -> None:
        """Every call is refused; a second close is not."""
        tier.close()
        tier.close()
        for call in (
            lambda: tier.put([b"k"], [b"page"]),
            lambda: tier.get([b"k"], [bytearray(4)]),
            lambda: tier.contains([b"k"]),
            lambda: tier.remove([b"k"]),
            lambda: tier.commit(),
        ):
            with pytest.raises(TierClosed):
                call()

    def test_threads(self, tier: Tier) -> None:
        """Eight of them, on the same pages and with eviction going on: a hit is always the right page."""
        keys, pages = self.samples(40)
        problems: list[str] = []

        def work(seed: int) -> None:
            draws = np.random.default_rng(seed)
            try:
                for _ in range(30):
                    chosen = draws.integers(0, len(keys), 3)
                    tier.put([keys[i] for i in chosen], [pages[i] for i in chosen])
                    out = self.buffers(3)
                    found = tier.get([keys[i] for i in chosen], out)
                    for i, length, buffer in zip(chosen, found, out, strict=True):
                        if length is not None and not np.array_equal(buffer[:length], pages[i]):
                            problems.append(f"page {i} is wrong")
                    tier.remove([keys[int(draws.integers(len(keys)))]])
                    if draws.integers(5) == 0:
                        tier.commit()
            except Exception as error:
                problems.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert problems == []
        assert not any(thread.is_alive() for thread in threads)
