"""The store against a dictionary, and what a caller can do wrong."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from plait.cuda_kernels import attention_reference
from plait.kvstore import (
    IntegrityError,
    KVSpec,
    KVStore,
    PoolExhausted,
    SequenceClosed,
    StepError,
)
from plait.kvstore import StoreError as KVStoreError
from plait.kvstore.extents import SPAN
from plait.kvstore.testing import StoreMachine
from threads import run_threads

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=4, page_tokens=4, dtype=torch.float64)


class LatentMachine(StoreMachine):
    """The same traffic; pages that never move, fixed from the start."""

    def make_store(self, spec: KVSpec) -> KVStore:
        return KVStore(spec, num_pages=24, grow=False)

    def grow(self) -> None:
        """A fixed store does not grow."""
        with pytest.raises(PoolExhausted):
            self.store.grow()


class ScanningMachine(StoreMachine):
    """The same traffic under another policy."""

    policy = "s3fifo"


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestScanningMachine = ScanningMachine.TestCase
TestScanningMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestFixedStoreMachine = LatentMachine.TestCase
TestFixedStoreMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def rows(count: int, spec: KVSpec = SPEC) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and values."""
    shape = (count, spec.kv_heads)
    return torch.randn(*shape, spec.head_dim).to(spec.dtype), torch.randn(*shape, spec.v_dim).to(
        spec.dtype
    )


def write(store: KVStore, seqs, counts) -> None:
    """One committed step of random tokens."""
    step = store.reserve(seqs, counts)
    for layer in range(store.spec.layers):
        store.append(step, layer, *rows(sum(counts), store.spec))
    store.commit(step)


def keep_duplicates(self, history, pages, length):
    """`PageCache.record` that indexes, but leaves a sequence its own copy of an indexed page."""
    stop = min(length, history.known) // self.index.size
    if stop > history.indexed:
        self.index.extend(history, pages, stop)
    return pages


MUTATIONS = {
    "no copy-on-write": ("pool.PagePool.copy", lambda self, source, target: None),
    "pages not shared": ("pool.PagePool.share", lambda self, pages: pages[:0]),
    "tenants not told apart": ("accounts.prefix_key", lambda secret, identity, tenant: bytes(64)),
    "copies not given up": ("cache.PageCache.record", keep_duplicates),
    "partial pages lost": ("cache.PageCache.record_tail", lambda self, *sequence: None),
    "ids not forgotten": ("tokens.History.truncate", lambda self, length: None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_machine_catches_a_broken_store(mutation, monkeypatch) -> None:
    """The conformance machine is worth something only if it fails a store that is wrong."""
    where, wrong = MUTATIONS[mutation]
    monkeypatch.setattr("plait.kvstore." + where, wrong)
    search = settings(
        max_examples=300, stateful_step_count=25, deadline=None,
        phases=[Phase.generate], print_blob=False,
    )  # fmt: skip
    with pytest.raises((AssertionError, KVStoreError, ValueError, IndexError)):
        run_state_machine_as_test(StoreMachine, settings=search)


def test_a_step_is_invisible_until_commit() -> None:
    store = KVStore(SPEC)
    a, b = store.open_batch(2)
    write(store, [a, b], [5, 2])
    step = store.reserve([a, b], [2, 1])
    k, v = rows(3)
    store.append(step, 0, k, v)
    q = torch.randn(2, 4, 4, dtype=torch.float64)
    before, _ = store.attend([a, b], 0, q)
    with_step, _ = store.attend([a, b], 0, q, q_indptr=[0, 1, 2], step=step)
    assert not torch.allclose(before, with_step)
    assert torch.equal(store.keys_values(a, 0)[0], store.keys_values(a, 0, step=step)[0][:5])
    assert torch.equal(store.keys_values(a, 0, step=step)[0][5:], k[:2])
    with pytest.raises(StepError, match=r"layers \[1\] are not written"):
        store.commit(step)
    store.abort(step)
    assert (a.length, b.length) == (5, 2)
    after, _ = store.attend([a, b], 0, q)
    assert torch.equal(before, after)
    store.check_integrity()


def test_pages_are_allocated_once_per_step() -> None:
    store = KVStore(KVSpec(layers=6, kv_heads=1, head_dim=2, page_tokens=4))
    seqs = store.open_batch(3)
    step = store.reserve(seqs, [9, 1, 4])
    allocated = store.counters()["pages_allocated"]
    assert allocated == 3 + 1 + 1
    for layer in range(6):
        store.append(step, layer, *rows(14, store.spec))
    store.commit(step)
    assert store.counters()["pages_allocated"] == allocated


def test_fork_shares_and_copies_one_page_on_write() -> None:
    store = KVStore(SPEC)
    a = store.open()
    write(store, [a], [10])
    used = store.counters()["bytes_used"]
    forks = [store.fork(a) for _ in range(3)]
    assert store.counters()["bytes_used"] == used
    kept = store.keys_values(a, 1)[0].clone()
    write(store, forks, [1, 1, 1])
    assert store.counters()["pages_copied"] == 3
    write(store, forks, [1, 1, 1])
    assert store.counters()["pages_copied"] == 3, "a private page is not copied again"
    assert torch.equal(store.keys_values(a, 1)[0], kept)
    write(store, [a], [1])
    assert store.counters()["pages_copied"] == 3, "the last holder writes in place"


def test_single_sequence_form_needs_no_step() -> None:
    store = KVStore(SPEC)
    with store.open(token_ids=[1, 2, 3], tenant="a") as seq:
        k, v = rows(3)
        store.append(seq, 0, k, v)
        q = torch.randn(3, 4, 4, dtype=torch.float64)
        o, lse = store.attend(seq, 0, q)
        hi = torch.tensor([1, 2, 3])
        want = attention_reference(q, k, v, hi * 0, hi, 0.5)
        torch.testing.assert_close(o, want[0])
        torch.testing.assert_close(lse, want[1])
        store.append(seq, 1, k, v)
        store.commit(seq)
        assert seq.length == 3
        assert seq.cached_tokens == 0
    assert seq.closed
    counters = store.counters()
    assert (counters["pages_cached"], counters["pages_free"]) == (1, counters["pages"] - 1)


def test_mixed_batch_of_prefill_and_decode_rows() -> None:
    store = KVStore(SPEC)
    seqs = store.open_batch(4)
    write(store, seqs, [0, 30, 7, 41])
    counts = [20, 1, 17, 3]  # two go the dense way, two the paged way
    step = store.reserve(seqs, counts)
    store.append(step, 0, *rows(41))
    q = torch.randn(41, 4, 4, dtype=torch.float64)
    slopes, sink = torch.rand(4).double(), torch.randn(4).double()
    q_pos = torch.cat(
        [torch.arange(s.length, s.length + c) for s, c in zip(seqs, counts, strict=True)]
    )
    o, lse = store.attend(
        seqs, 0, q, step=step, alibi_slopes=slopes, q_pos=q_pos, sink=sink, softcap=3.0
    )
    at = 0
    for seq, count in zip(seqs, counts, strict=True):
        k, v = store.keys_values(seq, 0, step=step)
        mine = slice(at, at + count)
        hi = torch.arange(seq.length + 1, seq.length + count + 1)
        want_o, want_lse = attention_reference(
            q[mine], k, v, hi * 0, hi, 0.5, 3.0, slopes, q_pos[mine], sink=sink
        )
        torch.testing.assert_close(o[mine], want_o, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[mine], want_lse, rtol=1e-12, atol=1e-12)
        at += count


def test_empty_sequences_and_rows_without_keys() -> None:
    store = KVStore(SPEC)
    a, b = store.open_batch(2)
    write(store, [b], [3])
    q = torch.randn(2, 4, 4, dtype=torch.float64)
    o, lse = store.attend([a, b], 0, q)
    assert o[0].eq(0).all()
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()
    assert store.attend([a, b], 0, q[:0], q_indptr=[0, 0, 0])[0].shape == (0, 4, 4)
    assert store.attend([], 0, q[:0])[0].shape == (0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latent_store_keeps_keys_only(dtype) -> None:
    spec = KVSpec(
        layers=1, kv_heads=1, head_dim=12, value_dim=8, shared_kv=True, dtype=dtype, page_tokens=4
    )
    assert spec.bytes_per_token == 12 * dtype.itemsize
    store = KVStore(spec)
    seq = store.open()
    k = torch.randn(9, 1, 12).to(dtype)
    store.append(seq, 0, k)
    q = torch.randn(1, 4, 12).to(dtype)
    o, lse = store.attend(seq, 0, q, scale=0.3)
    want = attention_reference(
        q.float(), k.float(), k[..., :8].float(), torch.tensor([0]), torch.tensor([9]), 0.3
    )
    torch.testing.assert_close(o.float(), want[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)
    store.commit(seq)
    with pytest.raises(ValueError, match="keeps K only"):
        store.append(seq, 0, k, k)


def test_views_are_not_copies_when_pages_follow_each_other() -> None:
    store = KVStore(SPEC, num_pages=16)
    a = store.open()
    write(store, [a], [9])
    write(store, [a], [9])
    k, _v = store.keys_values(a, 1)
    assert k.data_ptr() == store.pool.keys[1].data_ptr()
    table = store.page_table([a])
    assert table.kv_indptr.tolist() == [0, 5]
    assert table.kv_last_page_len.tolist() == [2]
    assert table.kv_indices.tolist() == [0, 1, 2, 3, 4]
    assert {t.dtype for t in (table.kv_indptr, table.kv_indices, table.kv_last_page_len)} == {
        torch.int32
    }


def test_exhaustion_says_what_is_missing_and_changes_nothing() -> None:
    store = KVStore(SPEC, device_bytes=4 * SPEC.bytes_per_page)
    a, b = store.open_batch(2)
    write(store, [a], [9])
    with pytest.raises(PoolExhausted, match="5 pages needed, 1 free") as caught:
        store.reserve([a, b], [4, 16])
    assert (caught.value.needed, caught.value.free, caught.value.pinned) == (5, 1, 3)
    assert a.step is None
    write(store, [a], [7])
    store.check_integrity()
    store.close(a)
    write(store, [b], [16])


def test_bad_input_is_refused_and_loses_no_page() -> None:
    store, other = KVStore(SPEC), KVStore(SPEC)
    a, b = store.open_batch(2)
    write(store, [a, b], [3, 3])
    step = store.reserve([a], [2])
    k, v = rows(2)
    for match, call in {
        "must be": lambda: store.append(step, 0, k[:1], v[:1]),
        "float32": lambda: store.append(step, 0, k.float(), v.float()),
        "layer 2": lambda: store.append(step, 2, k, v),
        "v is missing": lambda: store.append(step, 0, k),
        "past a sequence's end": lambda: store.attend(
            a, 0, k[:1].repeat(1, 2, 1), hi=torch.tensor([6])
        ),
        "does not cut": lambda: store.attend([a, b], 0, torch.zeros(3, 4, 4).double()),
        "another store": lambda: other.reserve([b], [1]),
        "token counts": lambda: store.reserve([b], [1, 2]),
        "truncate to 9": lambda: store.truncate(b, 9),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    for call in (
        lambda: store.reserve([a], [1]),
        lambda: store.truncate(a, 0),
        lambda: store.reorder([a], [0]),
        lambda: store.reserve([b, b], [1, 1]),
        lambda: store.commit(b),
    ):
        with pytest.raises(StepError):
            call()
    store.append(step, 0, k, v)
    with pytest.raises(StepError, match="already written"):
        store.append(step, 0, k, v)
    store.abort(step)
    with pytest.raises(StepError, match="aborted"):
        store.append(step, 1, k, v)
    with pytest.raises(IndexError, match="reorder"):
        store.reorder([a, b], [2])
    store.close(a)
    with pytest.raises(SequenceClosed):
        store.close(a)
    store.close(b)
    assert store.counters()["pages_free"] == store.counters()["pages"]
    store.check_integrity()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"layers": 0}, "layers"),
        ({"dtype": torch.int8}, "dtype"),
        ({"value_dim": 9, "shared_kv": True}, "value_dim"),
    ],
)
def test_spec_refuses_nonsense(wrong, match) -> None:
    with pytest.raises(ValueError, match=match):
        KVSpec(**{"layers": 1, "kv_heads": 1, "head_dim": 8, **wrong})


@pytest.mark.parametrize("size", ["4 GB of RAM", "-1", "", "GiB"])
def test_sizes_refuse_nonsense(size) -> None:
    with pytest.raises(ValueError, match="no size"):
        KVStore(SPEC, device_bytes=size)
    assert KVStore(SPEC, device_bytes="1MiB").cache.max_pages == (1 << 20) // SPEC.bytes_per_page
    with pytest.raises(ValueError, match="holds no page"):
        KVStore(SPEC, device_bytes=10)
    with pytest.raises(ValueError, match="grow=False"):
        KVStore(SPEC, grow=False)


def test_random_traffic_leaks_nothing() -> None:
    store = KVStore(
        KVSpec(layers=1, kv_heads=1, head_dim=2, page_tokens=4), num_pages=400, grow=False
    )
    draws = torch.Generator().manual_seed(1)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=draws))

    live: list = []
    for _ in range(3000):
        what = draw(6)
        if what == 0 or not live:
            live.append(store.open())
        elif what == 1:
            live.append(store.fork(live[draw(len(live))]))
        elif what == 2 or len(live) > 12:
            store.close(live.pop(draw(len(live))))
        elif what == 3:
            seq = live[draw(len(live))]
            store.truncate(seq, draw(seq.length + 1))
        else:
            step = store.reserve(live, [draw(3) for _ in live])
            store.append(step, 0, *rows(step.num_tokens, store.spec))
            (store.commit if draw(4) else store.abort)(step)
            for seq in live:
                if seq.length > 60:
                    store.truncate(seq, 10)
    store.check_integrity()
    store.close(live)
    counters = store.counters()
    assert counters["pages_free"] == 400
    assert counters["pages_allocated"] == counters["pages_freed"] > 2000
    assert counters["bytes_used"] == 0
    del live
    gc.collect()
    assert not store._sequences


def test_eight_threads() -> None:
    store = KVStore(SPEC, num_pages=2)
    shared = store.open()
    write(store, [shared], [6])

    def work(seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        seq = store.fork(shared)
        mine = [store.keys_values(seq, layer) for layer in range(2)]
        mine = [(k.clone(), v.clone()) for k, v in mine]
        for _ in range(25):
            count = int(torch.randint(1, 6, (1,), generator=draws))
            step = store.reserve([seq], [count])
            for layer in range(2):
                k, v = torch.randn(2, count, 2, 4, dtype=torch.float64, generator=draws)
                store.append(step, layer, k, v)
                mine[layer] = (torch.cat([mine[layer][0], k]), torch.cat([mine[layer][1], v]))
            store.commit(step)
            q = torch.randn(1, 4, 4, dtype=torch.float64, generator=draws)
            o, _ = store.attend(seq, 1, q)
            end = torch.tensor([seq.length])
            want, _ = attention_reference(q, *mine[1], end * 0, end, 0.5)
            torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
            assert torch.equal(store.keys_values(seq, 0)[0], mine[0][0])
        store.close(seq)

    run_threads(work)
    store.check_integrity()
    store.close(shared)
    assert store.counters()["pages_free"] == store.counters()["pages"]


def test_check_integrity_finds_what_was_broken() -> None:
    def fresh():
        store = KVStore(SPEC, num_pages=8)
        a, b = store.open_batch(2)
        write(store, [a, b], [6, 6])
        store.check_integrity()
        return store, a, b

    store, a, b = fresh()
    a.pages[0] = b.pages[0]
    with pytest.raises(IntegrityError):
        store.check_integrity()
    store, a, _ = fresh()
    store.pool.refcounts[a.pages[0]] += 1
    with pytest.raises(IntegrityError, match="count"):
        store.check_integrity()
    store, a, _ = fresh()
    a.tokens = 3
    with pytest.raises(IntegrityError, match="does not fit"):
        store.check_integrity()
    store, a, _ = fresh()
    store.pool.states[a.pages[0]] = 0
    with pytest.raises(IntegrityError):
        store.check_integrity()
    store, a, _ = fresh()
    store.pool.meta[SPAN, 4] += 1  # pages 4 to 7 are one free run
    with pytest.raises(IntegrityError, match="free runs"):
        store.check_integrity()


def test_reading_while_the_pool_grows_sees_both_halves_of_a_layer() -> None:
    """Keys of the new region with values of the old one were once handed to the kernel."""
    store = KVStore(SPEC, num_pages=2)
    seq = store.open()
    write(store, [seq], [5])
    q = torch.randn(1, 4, 4, dtype=torch.float64)
    step = store.reserve([seq], 1)
    store.append(step, 1, *rows(1))
    want, _ = store.attend(seq, 1, q, step=step)
    half_grown, go_on = threading.Event(), threading.Event()
    region, made = store.pool._region, []

    def slow(pages: int, width: int) -> torch.Tensor:
        made.append(width)
        if len(made) == 4:  # the last of two layers' keys and values: layer 1's values
            half_grown.set()
            go_on.wait(0.2)
        return region(pages, width)

    store.pool._region = slow  # type: ignore[method-assign]
    grower = threading.Thread(target=store.grow)
    grower.start()
    assert half_grown.wait(60)
    got, _ = store.attend(seq, 1, q, step=step)
    go_on.set()
    grower.join(60)
    assert torch.equal(got, want)
