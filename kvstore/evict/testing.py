"""Conformance of an eviction policy, for policies of other people too.

class TestMine(PolicyConformance):
    def make_policy(self): return MyPolicy()
"""

from __future__ import annotations

import numpy as np
import torch

from ..sequence import Sequence
from ..spec import KVSpec
from ..store import KVStore
from .policy import Chain, EvictionPolicy

_SPEC = KVSpec(layers=1, kv_heads=1, head_dim=1, page_tokens=4, dtype=torch.float64)


def serve(store: KVStore, ids: list[int], tenant: str | None = None) -> Sequence:
    """Open a prompt and write what is not cached; a token's key is its id."""
    seq = store.open(ids, tenant)
    rows = torch.tensor(ids[seq.cached_tokens :], dtype=store.spec.dtype)[:, None, None]
    k, v = (rows.expand(-1, store.spec.kv_heads, width) for width in store.spec.widths)
    for layer in range(store.spec.layers):
        store.append(seq, layer, k, v)
    store.commit(seq)
    return seq


class PolicyConformance:
    """A store full of prompts that share beginnings, with the policy under test."""

    def make_policy(self) -> EvictionPolicy:
        """Make the policy under test."""
        raise NotImplementedError

    def _store(self, num_pages: int = 40, grow: bool = False) -> KVStore:
        return KVStore(_SPEC, num_pages=num_pages, grow=grow, evict=self.make_policy())

    def _traffic(self, store: KVStore, rounds: int, seed: int) -> None:
        """Serve random prompts, some held for a while, under a store too small for all."""
        draws = np.random.default_rng(seed)
        held: list[Sequence] = []
        for _ in range(rounds):
            common = int(draws.integers(3))
            ids = [common] * int(draws.integers(20)) + draws.integers(9, size=6).tolist()
            seq = serve(store, ids)
            assert store.keys_values(seq, 0)[0].flatten().tolist() == ids
            held.append(seq)
            while len(held) > int(draws.integers(4)):
                store.close(held.pop(int(draws.integers(len(held)))))
            store.check_integrity()
        store.close(held)

    def test_random_traffic_never_meets_a_wrong_or_lost_page(self) -> None:
        """Victims are neither held nor followed (the store refuses them), and pages come back."""
        store = self._store()
        self._traffic(store, 300, 0)
        counters = store.counters()
        assert counters["pages_evicted"] > 40
        assert counters["pages_free"] + counters["pages_cached"] == 40
        store.evict()
        assert store.counters()["pages_free"] == 40

    def test_pinned_pages_stay_under_pressure(self) -> None:
        """A held prompt keeps its pages while everything else comes and goes."""
        store = self._store(24)
        held = serve(store, [7] * 20)
        for i in range(30):
            store.close(serve(store, [i + 8] * 17))
        assert store.keys_values(held, 0)[0].flatten().tolist() == [7] * 20
        store.close(held)
        assert store.match([[7] * 21]) == [20]

    def test_gives_as_many_as_it_is_asked_for(self) -> None:
        """All cached pages can be had, in one call or one by one."""
        store = self._store()
        self._traffic(store, 40, 1)
        cached = store.counters()["pages_cached"]
        assert store.evict(1) == 1
        assert store.evict(5) == 5
        assert store.evict() == cached - 6
        assert store.evict() == 0

    def test_cached_pages_stay_findable(self) -> None:
        """What is left of a prompt is its beginning."""
        store = self._store()
        store.close(serve(store, list(range(80))))
        for left in range(19, -1, -1):
            store.evict(1)
            assert store.match([list(range(81))]) == [left * 4]

    def test_follows_a_growing_store(self) -> None:
        """Pages that came with growth are pages like others."""
        store = self._store(3, grow=True)
        self._traffic(store, 60, 2)
        held = [serve(store, [i] * 9) for i in range(20)]
        assert store.counters()["times_grown"] > 2
        store.close(held)
        store.evict()
        store.check_integrity()
        assert store.counters()["pages_cached"] == 0

    def test_does_not_name_pages_before_it_was_told_of_any(self) -> None:
        """A policy without pages gives none."""
        policy = self.make_policy()
        policy.attach(Chain(*np.zeros((3, 8), np.int32)))
        assert len(policy.victims(4)) == 0
