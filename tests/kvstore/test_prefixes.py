"""Prefixes: what is found, what is never found, and what writing into shared pages leaves alone."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import pytest
import torch

from plait.kvstore import (
    Identity,
    IntegrityError,
    KVSpec,
    KVStore,
    SequenceClosed,
    StepError,
    chains,
    prefix,
    tokens,
)
from plait.kvstore.evict.testing import serve
from plait.kvstore.identity import prefix_key
from threads import run_threads

SPEC = KVSpec(layers=2, kv_heads=1, head_dim=1, page_tokens=4, dtype=torch.float64)
KEY = bytes(range(32))


def make(num_pages: int = 64, **options) -> KVStore:
    return KVStore(SPEC, num_pages=num_pages, grow=False, **options)


def content(store: KVStore, seq) -> list[float]:
    assert torch.equal(store.keys_values(seq, 0)[0], store.keys_values(seq, 1)[1])
    return store.keys_values(seq, 1)[0].flatten().tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 40])
def test_the_whole_of_a_closed_prompt_is_found_but_for_the_last_token(length) -> None:
    store, ids = make(), list(range(length))
    store.close(serve(store, ids))
    for prompt, want in ((ids, length - 1), ([*ids, 7], length), (ids[:-1], max(length - 2, 0))):
        assert store.match([prompt]) == [want]
        seq = store.open(prompt)
        assert (seq.cached_tokens, seq.length) == (want, want)
        assert content(store, seq) == ids[:want]
        store.close(seq)
        store.check_integrity()


@pytest.mark.parametrize("shared", range(14))
def test_the_longest_match_ends_inside_a_page(shared) -> None:
    store = make()
    store.close(serve(store, list(range(13))))
    prompt = [*range(shared), *[99] * 5]
    seq = serve(store, prompt)
    assert seq.cached_tokens == min(shared, 13)
    assert content(store, seq) == prompt
    assert store.match([[*range(13), 50]]) == [13], "the first prompt is as it was"
    store.check_integrity()


def test_the_best_of_several_continuations_is_taken() -> None:
    store = make()
    for tail in ([7, 7, 7], [7, 8], [9, 9, 9]):
        store.close(serve(store, [*range(8), *tail]))
    assert store.match([[*range(8), 7, 7, 1, 1], [*range(8), 7, 8, 1], [*range(8), 1]]) == [
        10,
        10,
        8,
    ]


def test_pages_of_a_running_sequence_are_found_when_they_are_full() -> None:
    store = make()
    seq = serve(store, list(range(7)))
    assert store.match([list(range(20))]) == [4]
    for token in range(7, 10):
        store.append(
            seq, 0, torch.full((1, 1, 1), float(token)).double(), torch.ones(1, 1, 1).double()
        )
        store.append(
            seq, 1, torch.full((1, 1, 1), float(token)).double(), torch.ones(1, 1, 1).double()
        )
        store.commit(seq, [token])
    assert store.match([list(range(20))]) == [8]
    twin = store.open(list(range(20)))
    assert store.pool.refcounts[twin.pages].tolist() == [2, 2]
    store.close([seq, twin])
    assert store.match([list(range(20))]) == [10]


def test_the_same_prompt_at_the_same_time_ends_in_the_same_pages() -> None:
    store = make()
    ids = list(range(10))
    seqs = store.open_batch([ids, ids, [*ids[:6], 50, 51, 52]])
    step = store.reserve(seqs, [10, 10, 9])
    assert store.counters()["pages_free"] == 64 - 9
    rows = torch.tensor([*ids, *ids, *ids[:6], 50, 51, 52]).double()[:, None, None]
    for layer in range(2):
        store.append(step, layer, rows, rows)
    store.commit(step)
    assert store.counters()["pages_merged"] == 3
    assert store.counters()["pages_free"] == 64 - 6
    assert content(store, seqs[1]) == ids
    assert content(store, seqs[2]) == [*ids[:6], 50, 51, 52]
    store.check_integrity()


def test_writing_after_a_truncation_leaves_what_was_promised() -> None:
    """The page is in the index: its only holder may not overwrite it."""
    store = make()
    seq = serve(store, list(range(8)))
    store.truncate(seq, 6)
    rows = torch.full((3, 1, 1), 77.0).double()
    for layer in range(2):
        store.append(seq, layer, rows, rows)
    store.commit(seq, [77, 77, 77])
    assert content(store, seq) == [0, 1, 2, 3, 4, 5, 77, 77, 77]
    other = store.open(list(range(9)))
    assert content(store, other) == list(range(8))
    assert store.match([[0, 1, 2, 3, 4, 5, 77, 77, 1]]) == [8]
    store.check_integrity()


def test_a_partial_page_grows_in_place_under_its_only_holder() -> None:
    store = make()
    store.close(serve(store, list(range(6))))
    seq = serve(store, list(range(12)))
    assert seq.cached_tokens == 6
    assert store.counters()["pages_copied"] == 0
    assert store.match([list(range(13))]) == [12]
    store.check_integrity()


@pytest.mark.parametrize(
    "as_given", [tuple, np.array, torch.tensor, lambda x: np.array(x, np.uint16)]
)
def test_ids_may_be_lists_arrays_or_tensors(as_given) -> None:
    store = make()
    store.close(serve(store, list(range(9))))
    assert store.match([as_given(list(range(10)))]) == [9]
    given = np.arange(10)
    with store.open(given) as seq:
        given[:] = 0
        assert seq.history.ids.tolist() == list(range(10))


# --- tenants -----------------------------------------------------------------------------------

NAMES = [None, "", "a", "a\0", "../../etc/passwd", "a" * 100_000, "\udcff", "'; drop table", "A"]


def test_no_tenant_finds_the_pages_of_another() -> None:
    store, ids = make(200), list(range(12))
    for mine in NAMES:
        assert store.match([[*ids, 1]] * 2, mine) == [0, 0]
        seq = store.open(ids, mine)
        assert seq.cached_tokens == 0
        store.close(seq)
        store.close(serve(store, ids, mine))
        assert store.match([[*ids, 1]], mine) == [12]
    store.check_integrity()
    assert store.counters()["tenants_cached"] == len(NAMES)
    store.evict()
    assert store.counters()["tenants_cached"] == 0


def test_no_other_call_reaches_another_tenants_tokens() -> None:
    store, ids = make(), list(range(12))
    store.close(serve(store, ids, "a"))
    thief = store.open(ids, "b")
    assert thief.length == 0
    assert store.keys_values(thief, 0)[0].numel() == 0
    assert store.page_table(thief).kv_indices.numel() == 0
    twin = store.fork(thief)
    store.tell(twin, ids)
    assert twin.length == 0
    again = serve(store, ids, "b")
    own = set(again.pages.tolist())
    assert own.isdisjoint(np.flatnonzero(store.cache.index.ids.any(1) & (store.pool.states == 3)))
    store.check_integrity()


def test_what_another_tenant_left_in_reserved_pages_is_not_read() -> None:
    """A pool hands pages on as they are: nobody reads them before writing them."""
    store, ids = make(3), list(range(12))
    store.close(serve(store, ids, "a"))
    store.evict()
    thief = store.open(tenant="b")
    step = store.reserve([thief], [12])
    q = torch.ones(12, 1, 1, dtype=torch.float64)
    left = store.pool.keys[0][step.pages].flatten().tolist()
    assert left == ids, "so there was something to read"
    for layer in range(2):
        with pytest.raises(StepError, match="not written yet"):
            store.keys_values(thief, layer, step)
        with pytest.raises(StepError, match="not written yet"):
            store.keys_values(thief, layer)
        with pytest.raises(StepError, match="not written yet"):
            store.attend([thief], layer, q, step=step)
    rows = torch.full((12, 1, 1), 7.0, dtype=torch.float64)
    store.append(step, 0, rows, rows)
    assert (store.keys_values(thief, 0, step)[0] == 7).all()
    with pytest.raises(StepError, match="not written yet"):
        store.attend([thief], 1, q, step=step)
    store.abort(step)
    assert store.keys_values(thief, 1)[0].numel() == 0


PUBLIC = {
    "open", "open_batch", "match", "tell", "close", "fork", "reorder", "truncate", "reserve", "append", "commit",
    "abort", "page_table", "keys_values", "attend", "observe",
}  # fmt: skip
ACCOUNTS = {  # these count, and name no token
    "counters", "tier_counters", "prometheus", "check_integrity", "evict", "flush", "grow", "shutdown", "wait",
}  # fmt: skip


def test_every_public_call_is_tried_by_these_tests() -> None:
    """A new call belongs into one of the lists, and if it tells of tokens, into a test across tenants."""
    assert {name for name in dir(KVStore) if not name.startswith("_") and callable(getattr(KVStore, name))} == (
        PUBLIC | ACCOUNTS
    )  # fmt: skip


def test_a_foreign_prefix_takes_the_path_of_a_miss(monkeypatch) -> None:
    """As many hashes, table searches and comparisons as for tokens that nobody ever gave."""
    store = make()
    store.close(serve(store, list(range(40)), "a"))
    store.close(serve(store, list(range(50, 60)), "b"))
    calls: list[str] = []

    def counted(module, name):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.append(name), inner(*args))[1])

    counted(prefix, "update")
    for name in ("find", "walk", "best_child"):
        counted(chains, name)
    paths = []
    for ids, tenant in (
        (range(41), "b"),
        (range(900, 941), "b"),
        (range(41), "c"),
        (range(41), "a"),
    ):
        calls.clear()
        store.match([list(ids)], tenant)
        paths.append(list(calls))
    assert paths[0] == paths[1] == paths[2]
    assert paths[0] != paths[3]


def test_keys_differ_by_tenant_identity_and_secret() -> None:
    same = Identity("w", "r", "s").digest(SPEC)
    keys = {prefix_key(KEY, same, name) for name in NAMES}
    keys.add(prefix_key(KEY[::-1], same, None))
    others = [
        Identity("w2", "r", "s"), Identity("w", "r2", "s"), Identity("w", "r", "s2"),
        Identity("w", "rs", ""), Identity("wr", "", "s"), Identity("w", "r", "s", "fp8"),
    ]  # fmt: skip
    digests = {identity.digest(SPEC) for identity in others} | {same}
    for field, value in {
        "layers": 3, "kv_heads": 2, "head_dim": 2, "page_tokens": 8, "dtype": torch.float32,
        "value_dim": 2, "shared_kv": True,
    }.items():  # fmt: skip
        given = {
            "layers": 2,
            "kv_heads": 1,
            "head_dim": 1,
            "page_tokens": 4,
            "dtype": torch.float64,
        }
        digests.add(Identity("w", "r", "s").digest(KVSpec(**{**given, field: value})))
    assert len(digests) == 14
    assert len(keys) == len(NAMES) + 1
    assert all(len(key) == 64 for key in keys)


# --- hashes ------------------------------------------------------------------------------------


def test_digests_are_keyed_blake2b_of_all_ids_up_to_the_page() -> None:
    ids = np.arange(100, 137, dtype=np.int32)
    history = tokens.History(KEY, ids, 4)
    want = [
        hashlib.blake2b(array("i", range(100, 104 + 4 * n)).tobytes(), key=KEY, digest_size=32).digest()
        for n in range(9)
    ]  # fmt: skip
    assert [row.tobytes() for row in history.digests(0, 9)] == want
    assert [row.tobytes() for row in history.digests(3, 5)] == want[3:5]
    assert history.digests(9, 9, 1)[0].tobytes() != want[8]


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_equal_hashes_of_different_tokens_are_no_hit(monkeypatch, bits) -> None:
    """With a hash of a few bits everything collides; content decides."""

    class Weak:
        def __init__(self, inner):
            self.inner = inner

        def copy(self):
            return Weak(self.inner.copy())

        def update(self, data):
            self.inner.update(data)

        def digest(self):
            return bytes([self.inner.digest()[0] & ((1 << bits) - 1)]) * 32

    for module in (prefix, tokens):
        monkeypatch.setattr(module, "page_hasher", lambda key: Weak(hashlib.blake2b(key=key[:64])))
    store = make(40)
    draws = np.random.default_rng(bits)
    for round in range(120):
        prompt = [0] * int(draws.integers(12)) + draws.integers(3, size=5).tolist()
        seq = serve(store, prompt, "ab"[round % 2])
        assert content(store, seq) == prompt
        store.check_integrity()
        store.close(seq)
    assert store.counters()["hash_collisions"] > 0


def test_the_collision_test_sees_a_store_that_trusts_hashes(monkeypatch) -> None:
    def trusting(links, ids, page, root, want, out):
        for i in range(len(want) - 1, -1, -1):
            out[i], page = page, max(links[chains.PARENT, page], 0)
        return len(want)

    monkeypatch.setattr(chains, "walk", trusting)
    with pytest.raises((AssertionError, IntegrityError)):
        test_equal_hashes_of_different_tokens_are_no_hit(monkeypatch, 1)


# --- bad input, threads, damage ----------------------------------------------------------------


def test_bad_ids_and_names_are_refused() -> None:
    store = make()
    for ids in ([-1], [2**31], [1.5], ["a"], [[1, 2]], np.array([0.5]), torch.rand(3), [None]):
        with pytest.raises(ValueError, match="token ids"):
            store.open(ids)
    for tenant in (b"a", 1, ["a"]):
        with pytest.raises(TypeError, match="tenant must be text"):
            store.open([1], tenant)
    for secret in (b"short", "x" * 32, b"x" * 65):
        with pytest.raises(ValueError, match="secret must be"):
            make(secret=secret)
    with pytest.raises(ValueError, match="token ids"):
        store.open_batch([[1, 2], [-3]])
    assert store.counters()["sequences"] == 0
    assert store.open([]).cached_tokens == 0


def test_wrong_ids_at_commit_are_refused_and_the_step_stays_open() -> None:
    store = make()
    seq, rows = store.open([1, 2, 3]), torch.zeros(3, 1, 1).double()
    for layer in range(2):
        store.append(seq, layer, rows, rows)
    for ids, match in (
        ([1, 2], "2.* token ids given"),
        ([1, 2, 4], "other ids"),
        ([-1] * 3, "must be"),
    ):
        with pytest.raises(ValueError, match=match):
            store.commit(seq, ids)
    store.commit(seq, [1, 2, 3])
    for layer in range(2):
        store.append(seq, layer, rows, rows)
    store.commit(seq)
    for layer in range(2):
        store.append(seq, layer, rows, rows)
    with pytest.raises(ValueError, match="knows the ids of 3 of its 6 tokens"):
        store.commit(seq, [1, 2, 3])
    store.tell(seq, [4, 5, 6])
    store.commit(seq, [7, 8, 9])
    store.close(seq)
    assert store.match([[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]) == [9]
    with pytest.raises(SequenceClosed):
        store.tell(seq, [1])
    with pytest.raises(StepError):
        store.commit(store.open([1]))


def test_a_store_without_room_evicts_before_it_refuses() -> None:
    store = make(4)
    store.close(serve(store, list(range(16))))
    assert store.counters()["pages_cached"] == 4
    held = serve(store, [*range(8), 90, 91])
    assert held.cached_tokens == 8
    assert store.counters()["pages_evicted"] == 1
    with pytest.raises(RuntimeError, match="2 pages needed, 1 free or evictable"):
        serve(store, [50] * 8)
    store.check_integrity()


def test_a_growing_store_does_not_grow_for_what_is_only_cached() -> None:
    store = KVStore(SPEC, num_pages=16)
    for i in range(50):
        store.close(serve(store, [i] * 20))
    assert store.counters()["pages"] == 16


def test_eight_threads_share_prefixes() -> None:
    store = KVStore(SPEC, num_pages=60, grow=False)

    def work(seed: int) -> None:
        draws = np.random.default_rng(seed)
        for _ in range(60):
            prompt = [0] * int(draws.integers(16)) + draws.integers(2, size=4).tolist()
            tenant = "ab"[int(draws.integers(2))]
            mine = [t + 1000.0 * (tenant == "b") for t in prompt]
            seq = store.open(prompt, tenant)
            assert content(store, seq) == mine[: seq.length]
            rows = torch.tensor(mine[seq.length :]).double()[:, None, None]
            for layer in range(2):
                store.append(seq, layer, rows, rows)
            store.commit(seq)
            assert content(store, seq) == mine
            store.close(seq)

    run_threads(work)
    store.check_integrity()
    assert store.counters()["tokens_found"] > 1000
    assert store.evict() + store.counters()["pages_free"] >= 60


def test_check_integrity_finds_what_was_broken_in_the_index() -> None:
    def fresh():
        store = make(secret=KEY)  # by a random one, a damaged digest may land where it was
        seq = serve(store, list(range(9)))
        store.close(serve(store, [*range(8), 20]))
        store.check_integrity()
        return store, seq, store.cache.index

    for match, damage in {
        "cannot be found": lambda s, q, x: x.digests.__setitem__((q.pages[0], 0), 1),
        "hold other tokens": lambda s, q, x: x.ids.__setitem__((q.pages[0], 0), 1),
        "no chain": lambda s, q, x: x.links.__setitem__((chains.PARENT, q.pages[1]), q.pages[2]),
        "count of children": lambda s, q, x: x.links.__setitem__((chains.CHILDREN, q.pages[0]), 2),
        "CACHED but in no prefix": lambda s, q, x: s.pool.promised.__setitem__(
            s.pool.states == 3, 0
        ),
        "miscounted": lambda s, q, x: x._roots.__setitem__((1, 0), 9),
        "lists of siblings": lambda s, q, x: x._roots.__setitem__((0, 0), -1),
    }.items():
        store, seq, index = fresh()
        damage(store, seq, index)
        with pytest.raises(IntegrityError, match=match):
            store.check_integrity()
