"""The store over its tiers: pages go down and come back by themselves, or are missed; never other ones."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from plait.kvstore import Identity, KVSpec, KVStore
from plait.kvstore.encoding import PageEncoding
from plait.kvstore.evict.testing import serve
from plait.kvstore.tiers import (
    DiskTier,
    FailTier,
    FormatTooNew,
    MemoryTier,
    TierError,
    TierLocked,
    TierRefused,
)
from plait.kvstore.tiers.choice import Meter
from plait.kvstore.tiers.faults import FaultyDisk, FaultyFolder
from plait.kvstore.tiers.form import BLOCK
from plait.kvstore.tiers.wrappers import TierWrapper
from threads import appears, run_threads

SPEC = KVSpec(layers=2, kv_heads=1, head_dim=2, value_dim=1, page_tokens=4, dtype=torch.float64)
PROMPT, OTHER = list(range(30)), list(range(100, 130))
SECRET = bytes(range(32))


def make(num_pages: int = 10, **options) -> KVStore:
    options = {"fetch": "always", "secret": SECRET, **options}
    return KVStore(options.pop("spec", SPEC), num_pages=num_pages, grow=False, **options)


def run(store: KVStore, ids: list[int], tenant: str | None = None) -> int:
    """Serve a prompt, check every key and value of it, close it; give the tokens that were cached."""
    seq = store.open(ids, tenant)
    cached = seq.cached_tokens
    rows = torch.tensor(ids[cached:], dtype=SPEC.dtype)[:, None, None]
    step = store.reserve([seq], [len(rows)])
    for layer in range(SPEC.layers):
        k = rows.expand(-1, 1, SPEC.head_dim) + 1000 * layer
        store.append(step, layer, k.contiguous(), -k[..., :1].contiguous())
    store.commit(step)
    for layer in range(SPEC.layers):
        k, v = store.keys_values(seq, layer)
        assert k[:, 0, 1].tolist() == [token + 1000 * layer for token in ids]
        assert torch.equal(v, -k[..., :1])
    store.close(seq)
    return cached


def fill(store: KVStore, prompt: list[int] = PROMPT) -> None:
    """Serve a prompt, make it durable, and lose it from the pool."""
    run(store, prompt)
    assert store.flush(60)
    store.evict()


TIERS = {
    "host": {"host_bytes": "1MiB"},
    "disk": {"disk_bytes": "1MiB"},
    "both": {"host_bytes": 4096 * 3, "disk_bytes": "1MiB"},
}


@pytest.mark.parametrize("codec", ["none", "zstd", "exponent"])
@pytest.mark.parametrize("tiers", TIERS)
def test_what_the_pool_lost_comes_back(tiers, codec, tmp_path) -> None:
    if codec == "zstd":
        pytest.importorskip("zstandard")
    spec = SPEC if codec != "exponent" else KVSpec(2, 1, 2, 4, torch.bfloat16, value_dim=1)
    options = dict(TIERS[tiers], codec=codec, spec=spec)
    if "disk_bytes" in options:
        options["disk"] = tmp_path / "c"
    prompts = [[first + 8 * i for i in range(22)] for first in (0, 1, 2)]  # exact in bfloat16
    with make(num_pages=6, **options) as store:
        for prompt in prompts:
            seq = serve(store, prompt)
            store.close(seq)
        assert store.flush(60)
        store.evict()
        for prompt in [*prompts, prompts[-1]]:
            seq = store.open(prompt)
            assert seq.cached_tokens == 20
            k, v = store.keys_values(seq, 1)
            assert k[:, 0, 0].tolist() == prompt[:20] == v[:, 0, 0].tolist()
            store.close(seq)
            store.check_integrity()
            store.evict()
        counts = store.tier_counters()
    assert counts["moves"]["pages_written"] == 15, "each page goes down once"
    assert counts["moves"]["pages_dropped"] == counts["moves"]["pages_missed"] == 0
    if tiers == "both":
        assert counts["host"]["hits"]
        assert counts["disk"]["hits"]
        assert counts["disk"]["get_bytes"] == 4096 * counts["disk"]["hits"]


def test_a_lossy_codec_comes_back_close() -> None:
    spec = KVSpec(2, 2, 16, 4, torch.float32)
    with make(spec=spec, host_bytes="1MiB", codec="int8") as store:
        seq = store.open(range(9))
        rows = torch.randn(8, 2, 16)
        store.append(seq, 0, rows, rows)
        store.append(seq, 1, rows, rows)
        store.commit(seq)
        store.close(seq)
        store.evict()
        assert store.flush(60)
        seq = store.open(range(9))
        assert seq.cached_tokens == 8
        got = store.keys_values(seq, 1)[1]
        assert 0 < (got - rows).abs().max() < 0.03
        store.close(seq)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_pages_of_latent_attention_come_back(codec, tmp_path) -> None:
    """Keys only, whose first columns are the values."""
    if codec == "zstd":
        pytest.importorskip("zstandard")
    spec = KVSpec(3, 1, 6, 4, torch.float32, value_dim=4, shared_kv=True)
    options = {"spec": spec, "codec": codec, "host_bytes": "1MiB", "disk": tmp_path / "c"}
    rows = torch.randn(3, 22, 1, 6)
    for cached in (0, 20):
        with make(num_pages=8, disk_bytes="1MiB", **options) as store:
            seq = store.open(range(22))
            assert seq.cached_tokens == cached
            step = store.reserve([seq], [22 - cached])
            for layer in range(3):
                store.append(step, layer, rows[layer, cached:])
            store.commit(step)
            for layer in range(3):
                k, v = store.keys_values(seq, layer)
                assert torch.equal(k, rows[layer])
                assert torch.equal(v, rows[layer, ..., :4])
            store.close(seq)


def test_the_next_process_finds_what_was_flushed(tmp_path) -> None:
    options = {"disk": tmp_path / "c", "disk_bytes": "1MiB", "secret": None}
    store = make(**options)
    run(store, PROMPT)
    store.shutdown()
    assert run(store, PROMPT) == 29, "a store goes on without its tiers"
    for cached, more in (
        (28, {}), (28, {"disk_bytes": None}), (28, {"disk_bytes": None, "disk_mode": "read"}),
        (0, {"identity": Identity(weights="others")}), (0, {"codec": "int8"}), (0, {"secret": SECRET}),
    ):  # fmt: skip
        with make(**{**options, **more}) as store:
            assert store.match([PROMPT, [*PROMPT[:9], 0]]) == [cached, min(cached, 8)]
            seq = store.open(PROMPT)
            assert seq.cached_tokens == cached, more
            store.close(seq)


def test_one_process_writes_a_directory_others_read_it(tmp_path) -> None:
    options = {"disk": tmp_path / "c", "disk_bytes": "1MiB", "secret": None}
    with make(**options) as store:
        fill(store)
        with pytest.raises(TierLocked, match="writer already"):
            make(**options)
        with make(**options, disk_mode="read") as reader:
            assert run(reader, PROMPT) == 28
            run(reader, OTHER)
            reader.flush(60)
            assert reader.tier_counters()["moves"]["pages_refused"] == 7
        assert run(store, PROMPT) == 28


def test_a_damaged_page_shortens_the_prefix_and_nothing_wrong_is_read(tmp_path) -> None:
    options = {"disk": tmp_path / "c", "disk_bytes": "1MiB"}
    with make(**options) as store:
        fill(store)
        with (tmp_path / "c" / "slab-00000").open("r+b") as slab:
            slab.seek(BLOCK + 3 * 8192 + BLOCK + 100)  # the fourth page's bytes
            slab.write(b"\xff")
        assert store.match([PROMPT]) == [28]
        assert run(store, PROMPT) == 12
        counts = store.tier_counters()
        assert (counts["disk"]["damaged"], counts["moves"]["pages_missed"]) == (1, 1)
        fill(store)
        assert run(store, PROMPT) == 28, "computed and written again"


@pytest.mark.parametrize("flips", [1.0, 0.2])
def test_a_tier_that_lies_is_not_believed(flips) -> None:
    host = FailTier(MemoryTier(40, 4096), seed=3, flips=flips)
    with make(tiers={"liar": host}) as store:
        for _ in range(10):
            fill(store)
        counts = store.tier_counters()
        assert counts["moves"]["pages_damaged"] > 0
        assert counts["liar"]["injected"] >= counts["moves"]["pages_damaged"]


def test_a_tier_that_lies_costs_no_other_tier_its_pages() -> None:
    liar, good = FailTier(MemoryTier(40, 4096), seed=3, flips=1.0), MemoryTier(40, 4096)
    with make(tiers={"liar": liar, "good": good}) as store:
        fill(store)
        assert run(store, PROMPT) == 28, "the other tier was asked"
        assert store.tier_counters()["moves"]["pages_damaged"] == 7
        assert good.counters()["pages"] == 7
        assert liar.counters()["pages"] == 0


def test_a_lie_that_is_believed_is_seen_by_these_tests(monkeypatch) -> None:
    monkeypatch.setattr(PageEncoding, "unseal", lambda *args: True)
    with make(tiers={"liar": FailTier(MemoryTier(40, 4096), seed=3, flips=1.0)}) as store:
        fill(store)
        with pytest.raises(AssertionError):  # noqa: PT012 - one of ten flips hits a number
            for _ in range(10):
                run(store, PROMPT)
                store.evict()


class Gated(TierWrapper):
    """A tier whose reads or writes wait for a gate."""

    def __init__(self, inner, *names: str) -> None:
        super().__init__(inner)
        self.names, self.gate = names, threading.Event()

    def around(self, name, pages, call, count):
        if name in self.names:
            self.gate.wait(60)
        return call()


def test_open_does_not_wait_and_what_needs_the_pages_does() -> None:
    tier = Gated(MemoryTier(40, 4096), "get")
    with make(tiers={"slow": tier}) as store:
        fill(store)
        seq = store.open(PROMPT)
        assert not seq.wait(0)
        assert not seq.wait(0.05)
        assert (seq.tokens, store.match([PROMPT])) == (0, [28])
        store.check_integrity()
        other = store.open(OTHER)  # nothing of it is in a tier: it does not wait for others
        assert other.cached_tokens == 0
        threading.Timer(0.05, tier.gate.set).start()
        assert store.keys_values(seq, 0)[0].shape[0] == 28
        assert seq.wait(0)
        store.close([seq, other])


@pytest.mark.parametrize("how", ["close", "late", "shutdown"])
def test_a_fetch_can_be_given_up(how) -> None:
    tier = Gated(MemoryTier(40, 4096), "get")
    store = make(tiers={"slow": tier})
    fill(store)
    seq = store.open(PROMPT, seconds=0.05 if how == "late" else None)
    if how == "late":
        assert seq.cached_tokens == 0
        assert store.tier_counters()["moves"]["late"] == 1
    elif how == "close":
        store.close(seq)
    else:
        threading.Timer(0.05, tier.gate.set).start()
        store.shutdown()
    if how != "shutdown":
        assert store.tier_counters()["moves"]["cancelled"] == 1
    if not seq.closed:
        store.close(seq)
    store.check_integrity()
    tier.gate.set()
    cached = run(store, PROMPT)
    assert cached == (28 if how != "shutdown" else cached)
    store.check_integrity()
    store.shutdown()
    store.evict()
    assert store.counters()["pages_free"] == 10


def test_eviction_waits_for_a_slow_tier_but_not_for_ever() -> None:
    tier = Gated(MemoryTier(2000, 4096), "put")
    with make(num_pages=600, tiers={"slow": tier}) as store:
        assert store.placement is not None
        store.placement.outbox._patience = 0.05
        store.close(serve(store, list(range(2399))))
        begin = time.monotonic()
        evicted, seconds = store.evict(), time.monotonic() - begin
        before, in_time = store.tier_counters()["moves"], store.flush(0.05)
        tier.gate.set()
        assert evicted == 600
        assert 0.05 <= seconds < 20
        assert not in_time
        assert before["write_waits"] >= 1
        assert before["pages_dropped"] >= 599 - 8 * 64
        assert store.flush(60)
        after = store.tier_counters()["moves"]
        assert after["pages_written"] + after["pages_dropped"] == 599


@pytest.mark.parametrize("flushed", [False, True])
def test_what_was_flushed_survives_a_power_cut(flushed) -> None:
    disk = FaultyDisk()
    tier = Gated(DiskTier(FaultyFolder(disk), page_bytes=4096, max_bytes="1MiB"), "put")
    store = make(tiers={"disk": tier})
    if flushed:
        tier.gate.set()
    run(store, PROMPT)
    assert store.flush(60 if flushed else 0.05) == flushed
    disk.power_cut(random.Random(0))
    tier.gate.set()
    with contextlib.suppress(TierError):
        store.shutdown(0)
    again = DiskTier(FaultyFolder(disk), page_bytes=4096, max_bytes="1MiB")
    with make(tiers={"disk": again}) as store:
        assert run(store, PROMPT) == (28 if flushed else 0)


def test_recompute_is_chosen_when_it_is_sooner() -> None:
    with make(tiers={"host": MemoryTier(40, 4096)}, fetch="sooner") as store:
        fill(store)
        assert store.placement is not None
        store.placement.stack.meters["host"] = Meter(clock=itertools.count().__next__)
        prefill = store.placement.prefill
        prefill._runs.clear()
        assert run(store, PROMPT) == 28, "nothing was measured: fetching measures"
        store.evict()
        prefill._runs.clear()
        prefill.add(1000, 0, 1e-9)
        for seconds, cached in ((1e-9, 0), (1e6, 28)):
            prefill._runs.clear()
            prefill.add(1000, 0, seconds)
            with store.open(PROMPT) as seq:
                assert seq.cached_tokens == cached
        moves = store.tier_counters()["moves"]
        assert (moves["recomputes"], moves["tokens_recomputed"]) == (1, 28)
        prefill._runs.clear()
        run(store, OTHER)
        assert prefill.speed is not None
        assert 0 < prefill.speed.per_token < 10, "a step measures"


def test_a_fetch_goes_on_from_the_device_prefix_and_shares_pages() -> None:
    with make(num_pages=20, host_bytes="1MiB") as store:
        fill(store)
        assert run(store, PROMPT[:14]) == 13 - 1
        a, b = store.open_batch([PROMPT, PROMPT])
        assert (a.cached_tokens, b.cached_tokens) == (28, 28)
        store.check_integrity()
        assert a.pages.tolist() == b.pages.tolist(), "the second gave its copies back"
        fork = store.fork(a)
        assert fork.cached_tokens == 28
        store.close([a, b, fork])
        assert store.flush(60)
        assert store.tier_counters()["moves"]["pages_written"] == 7, (
            "fetched pages do not go down again"
        )


def test_a_prompt_larger_than_the_pool_is_fetched_in_part() -> None:
    with make(host_bytes="1MiB") as store:
        fill(store)
        held = serve(store, OTHER[:14])
        seq = store.open(PROMPT)
        assert seq.cached_tokens == 24, "six pages were left"
        store.check_integrity()
        store.close([held, seq])


def test_tenants_find_nothing_of_each_other(tmp_path) -> None:
    """Neither by a public call, nor by the path of a lookup: the tiers are asked one key, as for new text."""
    with make(host_bytes="1MiB", disk=tmp_path / "c", disk_bytes="1MiB") as store:
        run(store, PROMPT, "a")
        assert store.flush(60)
        store.evict()

        def asked(ids: list[int], tenant: str | None) -> list[tuple[str, float]]:
            before = store.tier_counters()
            assert store.open(ids, tenant).cached_tokens == 0
            after = store.tier_counters()
            names = ("contains_pages", "get_pages", "found", "absent")
            return [
                (tier, after[tier].get(name, 0) - before[tier].get(name, 0))
                for tier in ("host", "disk") for name in names
            ]  # fmt: skip

        unseen = asked(OTHER, "b")
        assert unseen == [("host", 1), ("host", 0), ("host", 0), ("host", 1),
                          ("disk", 1), ("disk", 0), ("disk", 0), ("disk", 1)]  # fmt: skip
        for tenant in ("b", None, "", "a\0", "A", "../a"):
            assert asked(PROMPT, tenant) == unseen
            assert store.match([PROMPT], tenant) == [0]
        assert run(store, PROMPT, "a") == 28


def test_hostile_names_reach_no_path(tmp_path) -> None:
    names = ["../../etc/passwd", "a/b", "\0", "x" * 5000, "\ud800", "slab-00000"]
    with make(num_pages=64, disk=tmp_path / "c", disk_bytes="1MiB") as store:
        for name in names:
            run(store, PROMPT, name)
        assert store.flush(60)
        store.evict()
        assert [run(store, PROMPT, name) for name in names] == [28] * len(names)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "index", "lock", "slab-00000",
    }  # fmt: skip
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "c").iterdir()} == {"0o600"}
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    held = b"".join(path.read_bytes() for path in (tmp_path / "c").iterdir())
    assert not any(name.encode("utf-8", "surrogatepass") in held for name in names[:2])


def test_links_in_place_of_the_directory_or_its_secret_are_refused(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(TierRefused, match="link"):
        make(disk=tmp_path / "link", disk_bytes="1MiB")
    make(disk=tmp_path / "c", disk_bytes="1MiB", secret=None).shutdown()
    secret = tmp_path / "c" / "secret"
    secret.rename(tmp_path / "mine")
    secret.symlink_to(tmp_path / "mine")
    with pytest.raises(TierRefused, match="link"):
        make(disk=tmp_path / "c", secret=None)
    secret.unlink()
    make(disk=tmp_path / "c", secret=None).shutdown()  # and its lock was given back


@pytest.mark.parametrize("copy", [0, 1])
def test_a_secret_survives_a_flipped_bit(copy, tmp_path) -> None:
    options = {"disk": tmp_path / "c", "disk_bytes": "1MiB", "secret": None}
    with make(**options) as store:
        fill(store)
    path = tmp_path / "c" / "secret"
    data = bytearray(path.read_bytes())
    data[copy * 48 + 5] ^= 1
    path.write_bytes(data)
    with make(**options) as store:
        assert run(store, PROMPT) == 28
    path.write_bytes(b"")
    with make(**options) as store:
        assert run(store, PROMPT) == 0, "a new one: the pages are there, and nobody can name them"


def test_bad_input_is_refused_and_holds_no_lock(tmp_path) -> None:
    for error, match, options in (
        (ValueError, "no codec 'kivi9'; there are adaquant, bf16", {"codec": "kivi9"}),
        (ValueError, "known: lru", {"evict": "mru"}),
        (ValueError, "host_bytes=17 holds no page of 4096", {"host_bytes": 17}),
        (ValueError, "is no size", {"host_bytes": "much"}),
        (ValueError, "disk_bytes=99 needs disk=", {"disk_bytes": 99}),
        (ValueError, "holds no page", {"disk": tmp_path / "c", "disk_bytes": 99}),
        (FileNotFoundError, "give disk_bytes", {"disk": tmp_path / "c"}),
        (FileNotFoundError, "no-one", {"disk": tmp_path / "no-one", "disk_mode": "read"}),
        (ValueError, "'write' or 'read'", {"disk": tmp_path / "c", "disk_mode": "append"}),
        (ValueError, "'sooner' or 'always'", {"disk": tmp_path / "c", "disk_bytes": 10**6, "fetch": "never"}),
        (ValueError, "16 to 64", {"secret": b"short"}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            make(**options)
    (tmp_path / "file").write_text("")
    with pytest.raises(TierRefused, match="no directory"):
        make(disk=tmp_path / "file", disk_bytes="1MiB")
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(TierRefused, match="not a cache's"):
        make(disk=tmp_path / "home", disk_bytes="1MiB")
    with make(disk=tmp_path / "c", disk_bytes="1MiB") as store:
        fill(store)
    larger = KVSpec(64, 8, 64, 16, torch.float64)
    with pytest.raises(ValueError, match="slots for pages of 4096 bytes"):
        make(spec=larger, disk=tmp_path / "c")
    index = tmp_path / "c" / "index"
    data = bytearray(index.read_bytes())
    data[8:10] = 2, 253
    index.write_bytes(data)
    with pytest.raises(FormatTooNew):
        make(disk=tmp_path / "c")
    assert index.read_bytes() == data


def test_a_full_disk_costs_pages_of_the_tier_only(tmp_path) -> None:
    with make(num_pages=40, disk=tmp_path / "c", disk_bytes="60KiB") as store:
        for first in range(0, 300, 30):
            run(store, list(range(first, first + 30)))
            # at each prompt: pages of one batch that find no room are refused, nothing is evicted for them
            assert store.flush(60)
        assert store.tier_counters()["disk"]["evicted"] > 0
        store.evict()
        for first in range(0, 300, 30):
            assert run(store, list(range(first, first + 30))) % 4 == 0
        store.check_integrity()


def test_counters_as_prometheus_text() -> None:
    with make(host_bytes="1MiB") as store:
        fill(store)
        run(store, PROMPT)
        lines = store.prometheus().splitlines()
    assert 'plait_tier_tokens_found{tier="device"} 28' in lines
    assert 'plait_tier_hits{tier="host"} 7' in lines
    assert 'plait_tier_get_bytes{tier="host"} 28672' in lines
    assert 'plait_tier_pages_fetched{tier="moves"} 7' in lines
    assert any(line.startswith('plait_tier_get_seconds{tier="host"}') for line in lines)


def test_eight_threads_and_few_pages(tmp_path) -> None:
    store = make(
        num_pages=60, host_bytes=4096 * 20, disk=tmp_path / "c", disk_bytes="300KiB", evict="s3fifo"
    )

    def work(seed: int) -> None:
        draws = np.random.default_rng(seed)
        for _ in range(12):
            prompt = [0] * int(draws.integers(16)) + draws.integers(2, size=8).tolist()
            run(store, prompt, "ab"[int(draws.integers(2))])

    def fetch_and_work(seed: int) -> None:
        run(store, OTHER)  # the newest in the tiers: there, whatever they forgot of the first half
        work(seed)

    with store:
        run_threads(work)
        assert store.flush(60)
        fill(store, OTHER)
        before = store.tier_counters()["moves"]["pages_fetched"]
        run_threads(fetch_and_work)
        store.check_integrity()
        moves = store.tier_counters()["moves"]
        assert moves["pages_fetched"] > before
        assert moves["pages_damaged"] == 0
    assert store.evict() + store.counters()["pages_free"] >= 60


def test_a_dropped_store_ends_its_threads_and_gives_its_lock_back(tmp_path) -> None:
    gc.collect()  # the threads of other tests' stores
    before = set(threading.enumerate())
    store = make(disk=tmp_path / "c", disk_bytes="1MiB")
    run(store, PROMPT)
    assert set(threading.enumerate()) - before
    del store
    gc.collect()
    assert not set(threading.enumerate()) - before
    with make(disk=tmp_path / "c") as store:
        assert run(store, PROMPT) == 28, "it flushed first"


COLLECTORS = {
    "outbox": (PageEncoding, "seal"),
    "moves": (MemoryTier, "put"),
    "committer": (MemoryTier, "contains"),
    "fetcher": (PageEncoding, "unseal"),
}


@pytest.mark.parametrize("thread", COLLECTORS)
def test_a_dropped_store_ends_when_its_own_thread_collects_it(thread, monkeypatch) -> None:
    """The garbage collector runs in any thread, and none can wait for its own end."""
    gc.collect()  # the threads of other tests' stores
    before, gate, tier = set(threading.enumerate()), threading.Event(), MemoryTier(40, 4096)
    store = make(tiers={"host": tier})
    if thread == "fetcher":
        fill(store)
    where, name = COLLECTORS[thread]
    real, gone = getattr(where, name), weakref.ref(store)

    def collecting(*args):
        if gone() is not None and threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)
            gc.collect()
        return real(*args)

    monkeypatch.setattr(where, name, collecting)
    gc.disable()  # only that thread collects
    try:
        seq = store.open(PROMPT) if thread == "fetcher" else serve(store, PROMPT)
        del store, seq
        assert gone() is not None, "it and its open sequence hold each other"
        gate.set()
        assert appears(lambda: not set(threading.enumerate()) - before), threading.enumerate()
    finally:
        gc.enable()
    assert gone() is None
    assert tier.closed
    assert tier.counters()["pages"] == 7, "it flushed first"


def test_a_store_that_was_shut_down_is_kept_by_nothing() -> None:
    """Not even by a clock that knows it."""

    class Clock:
        store: KVStore

        def __call__(self) -> float:
            return time.monotonic()

    clock = Clock()
    clock.store = make(tiers={"host": MemoryTier(40, 4096)}, clock=clock)
    run(clock.store, PROMPT)
    gone = weakref.ref(clock.store)
    clock.store.shutdown()
    del clock
    gc.collect()
    assert gone() is None


def test_traffic_gives_back_every_page_row_slot_and_thread(tmp_path) -> None:
    gc.collect()  # the threads of other tests' stores
    before, draws = set(threading.enumerate()), np.random.default_rng(5)
    store = make(num_pages=40, host_bytes=4096 * 8, disk=tmp_path / "c", disk_bytes="200KiB")
    held = []
    for turn in range(400):
        prompt = [0] * int(draws.integers(12)) + draws.integers(2, size=6).tolist()
        seq = store.open(prompt, "ab"[turn % 2], seconds=[None, 0.0, 1e-3][turn % 3])
        if turn % 5:
            seq.wait()
        if turn % 7 == 0:
            held.append(seq)
        else:
            store.close(seq)
            run(store, prompt, "ab"[turn % 2])
        if len(held) > 3:
            store.close(held.pop(0))
        if turn % 20 == 0:
            assert store.flush(60)
            store.evict()
    store.close(held)
    assert store.flush(60)
    assert store.placement is not None
    outbox, fetcher = store.placement.outbox, store.placement.fetcher
    assert sorted(outbox._rows) == list(range(len(outbox._stage.bytes)))
    assert not fetcher._queue
    assert store.placement.moves.waiting_bytes == 0
    counts = store.tier_counters()
    assert counts["moves"]["pages_fetched"] > 0
    assert counts["host"]["pages"] <= 8
    assert counts["disk"]["pages"] <= 24
    store.evict()
    device = store.counters()
    assert (device["pages_free"], device["sequences"], device["tenants_cached"]) == (40, 0, 0)
    assert device["pages_allocated"] == device["pages_freed"]
    store.check_integrity()
    store.shutdown()
    assert not set(threading.enumerate()) - before
    assert (tmp_path / "c" / "slab-00000").stat().st_size <= 200 << 10
