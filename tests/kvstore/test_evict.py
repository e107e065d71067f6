"""Eviction policies: the shipped conformance, what each is for, and policies that break the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.kvstore import KVSpec, KVStore, StoreError
from plait.kvstore.evict import LRU, POLICIES, S3FIFO, CostAware, TinyLFU
from plait.kvstore.evict.testing import PolicyConformance, serve
from plait.kvstore.evict.tinylfu import count_uses, popularity

SPEC = KVSpec(layers=1, kv_heads=1, head_dim=1, page_tokens=4, dtype=torch.float64)


class Plain:
    """The least policy a stranger would write: the oldest first, a dict and a list."""

    def attach(self, chain):
        self.chain = chain
        self.order = getattr(self, "order", {})

    def admitted(self, pages, keys, depths):
        self.order.update(dict.fromkeys(pages.tolist()))

    def touched(self, pages):
        pass

    def pinned(self, pages):
        pass

    def unpinned(self, pages):
        pass

    def removed(self, pages):
        for page in pages.tolist():
            del self.order[page]

    def victims(self, count):
        free = [p for p in self.order if not self.chain.holders[p] and not self.chain.children[p]]
        return np.array(free[:count], np.int32)


class TestPlain(PolicyConformance):
    make_policy = staticmethod(Plain)


class TestLRU(PolicyConformance):
    make_policy = staticmethod(LRU)


class TestS3FIFO(PolicyConformance):
    make_policy = staticmethod(S3FIFO)


class TestTinyLFU(PolicyConformance):
    make_policy = staticmethod(TinyLFU)


class TestCostAware(PolicyConformance):
    make_policy = staticmethod(CostAware)


def small(evict, pages=12) -> KVStore:
    # one secret: hashes of pages decide who meets whom in sketches and ghost tables
    return KVStore(SPEC, num_pages=pages, grow=False, evict=evict, secret=bytes(32))


def use(store, *prompts) -> None:
    for prompt in prompts:
        store.close(serve(store, prompt))


def found(store, *prompts) -> list[int]:
    return store.match([[*prompt, 999] for prompt in prompts])


A, B, C, D = ([i] * 16 for i in (1, 2, 3, 4))  # four pages each; three fit


def test_lru_loses_the_longest_unused_from_its_end() -> None:
    store = small("lru")
    use(store, A, B, C, A, [4] * 8)
    assert found(store, A, B, C) == [16, 8, 16]


def test_lru_counts_use_until_the_close() -> None:
    store = small("lru")
    long = serve(store, A)
    use(store, B, C)
    store.close(long)
    use(store, D)
    assert found(store, A, B, C, D) == [16, 0, 16, 16]


@pytest.mark.parametrize("name", ["s3fifo", "tinylfu"])
def test_one_scan_does_not_drive_out_what_is_used_often(name) -> None:
    def hot_after_scan(evict) -> int:
        store = small(evict, 40)
        for _ in range(6):
            use(store, A, B)
        for i in range(60):
            use(store, [100 + i] * 16)
        return sum(found(store, A, B))

    assert hot_after_scan("lru") == 0
    assert hot_after_scan(name) == 32


def test_tinylfu_remembers_while_the_store_grows() -> None:
    """Favourites of a small store are favourites of the large one, when at last pages must go."""
    store = KVStore(
        SPEC,
        num_pages=20,
        device_bytes=120 * SPEC.bytes_per_page,
        evict="tinylfu",
        secret=bytes(32),
    )
    for _ in range(6):
        use(store, A, B)
    held = [serve(store, [50 + i] * 16) for i in range(28)]
    assert store.counters()["times_grown"] >= 2
    store.close(held)
    for i in range(90):
        use(store, [100 + i] * 16)
    assert store.counters()["pages_evicted"] > 0
    assert found(store, A, B) == [16, 16]


def test_ghosts_that_return_are_kept() -> None:
    def kept_after_scan(return_: bool) -> int:
        store = small(S3FIFO(), 160)
        prompts = [[200 + i] * 16 for i in range(5)]
        use(store, *prompts, *([300 + i] * 16 for i in range(39)))
        assert sum(found(store, *prompts)) < 40
        if return_:
            use(store, *prompts)
        use(store, *([400 + i] * 16 for i in range(120)))
        return sum(found(store, *prompts))

    assert kept_after_scan(return_=False) == 0
    assert kept_after_scan(return_=True) > 40


def test_cost_aware_keeps_what_is_dear_to_compute() -> None:
    store = small(CostAware(attention_share=10.0), 20)
    use(store, list(range(40)))
    use(store, *([100 + i] * 8 for i in range(5)))
    use(store, [300] * 8)
    assert found(store, list(range(40))) == [40]
    assert sum(found(store, *([100 + i] * 8 for i in range(5)))) < 40


def test_the_sketch_counts_and_forgets() -> None:
    sketch = np.zeros((4, 256), np.uint8)
    keys = np.random.default_rng(0).integers(1 << 63, size=50).astype(np.uint64)
    count_uses(sketch, np.repeat(keys[:10], 5))
    count_uses(sketch, keys[10:])
    assert min(popularity(sketch, key) for key in keys[:10]) >= 5
    assert sum(popularity(sketch, key) for key in keys[10:]) < 60


@pytest.mark.parametrize("wrong", ["pinned", "parents first", "nothing", "no page", "one twice"])
def test_a_policy_that_breaks_the_rules_is_refused_and_loses_no_page(wrong) -> None:
    class Wrong(LRU):
        def victims(self, count):
            chain = self._leaves.chain
            return {
                "pinned": np.flatnonzero(chain.holders)[:1],
                "parents first": np.flatnonzero((chain.children > 0) & (chain.holders == 0))[:1],
                "nothing": np.empty(0, np.int32),
                "no page": np.array([10**6]),
                "one twice": np.repeat(super().victims(1), 2),
            }[wrong]

    store = small(Wrong())
    use(store, A, B)
    held = serve(store, [5] * 7)
    with pytest.raises(StoreError, match="eviction policy Wrong"):
        store.evict(3)
    store.check_integrity()
    assert store.keys_values(held, 0)[0].flatten().tolist() == [5] * 7
    store.close(held)
    counters = store.counters()
    assert counters["pages_free"] + counters["pages_cached"] == counters["pages"]


def test_names() -> None:
    with pytest.raises(ValueError, match="known: lru, s3fifo, tinylfu, cost"):
        small("fifo")
    with pytest.raises(TypeError, match="lacks attach, admitted"):
        small(object())
    assert set(POLICIES) == {"lru", "s3fifo", "tinylfu", "cost"}
    for wrong in (lambda: S3FIFO(0.0), lambda: TinyLFU(1.0), lambda: CostAware(-1.0)):
        with pytest.raises(ValueError, match="must"):
            wrong()
