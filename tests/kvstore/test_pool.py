"""The pool: free runs against a plain set, sizes, the memory of its books."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from plait.kvstore import IntegrityError, KVSpec, KVStore, PagePool, PoolExhausted
from plait.kvstore.evict import POLICIES
from plait.kvstore.page import PageState

TINY = KVSpec(layers=1, kv_heads=1, head_dim=1, page_tokens=16, dtype=torch.float16, shared_kv=True)


def take(pool: PagePool, *counts: int, after: int = -1) -> np.ndarray:
    return pool.allocate(np.array(counts), np.full(len(counts), after))


def runs(pages: np.ndarray) -> int:
    return 1 + int((np.diff(pages) != 1).sum())


def test_random_traffic_against_a_set() -> None:
    pool, draws = PagePool(TINY, 500), np.random.default_rng(0)
    held: list[np.ndarray] = []
    for turn in range(2000):
        if draws.random() < 0.55:
            counts = draws.integers(0, 12, size=3)
            try:
                pages = pool.allocate(counts, draws.integers(-1, 500, size=3))
            except PoolExhausted:
                assert counts.sum() > pool.free_pages
                continue
            assert len(set(pages.tolist())) == counts.sum()
            held.append(pages)
        elif held:
            pages = held.pop(int(draws.integers(len(held))))
            pool.release(draws.permutation(pages))
        if turn % 50 == 0:
            everything = np.concatenate([*held, np.empty(0, np.int32)]).astype(np.int64)
            pool.check_integrity(np.bincount(everything, minlength=500))
            assert pool.free_pages == 500 - len(everything)
    for pages in held:
        pool.release(pages)
    assert runs(take(pool, 500)) == 1, "all free pages are one run again"


def test_runs_are_kept_whole() -> None:
    pool = PagePool(TINY, 64)
    first = take(pool, 8, 8)
    assert first.tolist() == list(range(16))
    pool.release(first[:8])
    assert take(pool, 3).tolist() == [0, 1, 2], "the shortest run that is long enough"
    assert take(pool, 2, after=15).tolist() == [16, 17], "behind its owner's last page"
    assert take(pool, 20).tolist() == list(range(18, 38)), (
        "one run, although five pages lie before it"
    )
    assert runs(take(pool, 31)) == 2
    with pytest.raises(PoolExhausted, match="1 pages needed, 0 free"):
        take(pool, 1)


def test_each_sequence_grows_behind_its_own_pages() -> None:
    store = KVStore(KVSpec(layers=1, kv_heads=1, head_dim=1, page_tokens=1), num_pages=16)
    a, b = store.open_batch(2)
    for seqs, counts in (([a], [2]), ([b], [6])):
        step = store.reserve(seqs, counts)
        store.append(step, 0, *torch.zeros(2, sum(counts), 1, 1))
        store.commit(step)
    store.truncate(b, 1)
    step = store.reserve([b, a], [2, 1])
    assert step.table.pages(0).tolist() == [2, 3, 4]
    store.abort(step)


def test_a_page_cannot_be_let_go_twice_or_leave_its_state_wrongly() -> None:
    pool = PagePool(TINY, 4)
    pages = take(pool, 2)
    pool.release(pages)
    for call in (pool.release, pool.share, pool.commit, pool.free_cached):
        with pytest.raises(IntegrityError):
            call(pages)
    assert (pool.states == PageState.FREE).all()
    pool.check_integrity(np.zeros(4, np.int32))


@pytest.mark.parametrize("evict", POLICIES)
def test_books_take_less_than_200_bytes_a_page_at_a_million(evict) -> None:
    """All arrays beside the pages themselves; torch's own memory is not traced."""
    KVStore(TINY, num_pages=1)  # what loads once is not counted
    tracemalloc.start()
    store = KVStore(TINY, num_pages=1_000_000, grow=False, evict=evict)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store.close(serve_keys(store, list(range(1000)), "a"))
    assert held / store.pool.capacity < 200


def test_device_bytes_are_taken_at_once() -> None:
    store = KVStore(TINY, device_bytes="1 MiB")
    assert store.counters()["bytes_held"] == 1 << 20
    assert store.counters()["pages"] == (1 << 20) // TINY.bytes_per_page
    assert KVStore(TINY, device_bytes="1 MiB", num_pages=3).counters()["pages"] == 3


def test_hours_of_traffic_leak_no_page() -> None:
    store = KVStore(TINY, num_pages=300, grow=False)
    draws = np.random.default_rng(1)
    live: list = []
    for _ in range(4000):
        what = draws.random()
        if what < 0.45 or not live:
            prompt = [0] * int(draws.integers(100)) + draws.integers(4, size=20).tolist()
            try:
                live.append(serve_keys(store, prompt, str(draws.integers(3))))
            except PoolExhausted:
                store.close(live)
                live = []
        elif what < 0.6:
            live.append(store.fork(live[int(draws.integers(len(live)))]))
        elif what < 0.7:
            seq = live[int(draws.integers(len(live)))]
            store.truncate(seq, int(draws.integers(seq.length + 1)))
        elif what < 0.75:
            store.evict(int(draws.integers(20)))
        else:
            store.close(live.pop(int(draws.integers(len(live)))))
    store.check_integrity()
    store.close(live)
    counters = store.counters()
    assert counters["pages_evicted"] > 1000
    assert counters["tokens_found"] > 10_000
    assert counters["pages_free"] + counters["pages_cached"] == 300
    store.evict()
    counters = store.counters()
    assert counters["pages_free"] == 300
    assert counters["pages_allocated"] == counters["pages_freed"]
    assert (counters["sequences"], counters["tenants_cached"]) == (0, 0)
    store.check_integrity()


def serve_keys(store: KVStore, prompt: list[int], tenant: str):
    seq = store.open(prompt, tenant)
    try:
        store.append(seq, 0, torch.zeros(len(prompt) - seq.length, 1, 1, dtype=torch.float16))
    except PoolExhausted:
        store.close(seq)
        raise
    store.commit(seq)
    return seq
