"""Moves: right, bounded, cancellable, on time; and the choice between fetching and computing."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

from plait.kvstore.tiers import DiskTier, FailTier, MemoryTier, TierClosed, TierError, TierWrapper
from plait.kvstore.tiers import moves as moves_module
from plait.kvstore.tiers.choice import Meter, PrefillSpeed, fetch_or_recompute
from plait.kvstore.tiers.moves import Moves
from plait.kvstore.tiers.testing import sample


class Gate(TierWrapper):
    """A tier that is slow as long as we like."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.go, self.entered = threading.Event(), threading.Semaphore(0)

    def around(self, name, pages, call, count):
        if pages:
            self.entered.release()
            assert self.go.wait(60)
        return call()


@pytest.fixture(autouse=True)
def page_by_page(monkeypatch) -> None:
    monkeypatch.setattr(moves_module, "CHUNK_BYTES", 4096)


def batch(count: int, length: int = 4096, first: int = 0):
    made = [sample(first + i, length) for i in range(count)]
    return [key for key, _ in made], [page for _, page in made]


def test_what_is_stored_is_loaded_and_survives(tmp_path) -> None:
    keys, pages = batch(40)
    with DiskTier(tmp_path / "c", page_bytes=4096, max_bytes="1MiB") as tier, Moves(tier) as moves:
        stores = [moves.store(keys[i : i + 10], pages[i : i + 10]) for i in range(0, 40, 10)]
        assert all(move.wait(60) for move in stores)
        assert all(all(move.held) for move in stores)
        assert moves.waiting_bytes == 0
        assert moves.storing.bytes_per_second > 0
    with DiskTier(tmp_path / "c") as tier, Moves(tier) as moves:
        out = [np.zeros(4096, np.uint8) for _ in range(41)]
        move = moves.load([*keys, b"other"], out)
        assert move.wait(60)
        assert move.held == [True] * 40 + [False]
        assert all(np.array_equal(a, b) for a, b in zip(out, pages, strict=False))
        assert moves.load([], []).wait(0)


def test_a_store_is_durable_when_it_is_done(tmp_path) -> None:
    keys, pages = batch(6)
    tier = DiskTier(tmp_path / "c", page_bytes=4096, max_bytes="1MiB")
    with Moves(tier) as moves:
        assert moves.store(keys, pages).wait(60)
    with DiskTier(tmp_path / "c", mode="read") as reader:
        assert reader.contains(keys) == [True] * 6
    tier.close()


def test_a_cancelled_load_writes_no_more() -> None:
    keys, pages = batch(20)
    gate = Gate(MemoryTier(20, 4096))
    gate.inner.put(keys, pages)
    out = [np.zeros(4096, np.uint8) for _ in range(20)]
    with Moves(gate, threads=2) as moves:
        move = moves.load(keys, out)
        gate.entered.acquire(timeout=60)
        gate.entered.acquire(timeout=60)
        move.cancel()
        assert not move.wait(0)
        gate.go.set()
        assert move.wait(60)
        assert moves.waiting_bytes == 0
    assert sum(move.held) == 2, "the two that had begun"
    assert [buffer.any() for buffer in out] == move.held


def test_what_is_late_does_not_begin() -> None:
    keys, pages = batch(10)
    now = [0.0]
    gate = Gate(MemoryTier(20, 4096))
    with Moves(gate, threads=1, clock=lambda: now[0]) as moves:
        move = moves.store(keys, pages, seconds=5)
        gate.entered.acquire(timeout=60)
        now[0] = 6
        gate.go.set()
        assert move.wait(60)
        assert sum(move.held) == 1
        assert moves.store(keys, pages, seconds=-1).held == [False] * 10


def test_loads_go_before_stores() -> None:
    keys, pages = batch(6)
    order = []

    class Note(Gate):
        def around(self, name, pages, call, count):
            order.append(name)
            return super().around(name, pages, call, count)

    gate = Note(MemoryTier(20, 4096))
    with Moves(gate, threads=1) as moves:
        first = moves.store(keys[:1], pages[:1])
        gate.entered.acquire(timeout=60)
        second = moves.store(keys[1:], pages[1:])
        load = moves.load(keys[:1], [np.zeros(4096, np.uint8)])
        gate.go.set()
        assert all(move.wait(60) for move in (first, second, load))
    assert [name for name in order if name in ("put", "get")] == ["put", "get", *["put"] * 5]


def test_who_brings_too_much_waits() -> None:
    keys, pages = batch(12)
    gate = Gate(MemoryTier(20, 4096))
    with Moves(gate, threads=1, queue_bytes=4 * 4096) as moves:
        first = moves.store(keys[:4], pages[:4])
        refused = moves.store(keys[4:8], pages[4:8], seconds=0.05)
        assert refused.wait(0)
        assert refused.held == [False] * 4
        late: list = []
        thread = threading.Thread(target=lambda: late.append(moves.store(keys[8:], pages[8:])))
        thread.start()
        time.sleep(0.02)
        assert not late
        assert moves.waiting_bytes == 4 * 4096
        gate.go.set()
        thread.join(60)
        assert first.wait(60)
        assert late[0].wait(60)
        assert all(late[0].held)
        huge = moves.store(*batch(9, first=50))
        assert huge.wait(60), "a move larger than the queue goes alone"
        assert sum(huge.held) == 9


def test_errors_come_out_of_wait() -> None:
    keys, pages = batch(3)
    with Moves(FailTier(MemoryTier(4, 4096), seed=0, errors=1)) as moves:
        move = moves.store(keys, pages)
        with pytest.raises(TierError, match="asked for"):
            move.wait(60)
        assert move.held == [False] * 3
        with pytest.raises(ValueError, match="does not fit"):
            moves.store([b"k"], [bytes(5000)]).wait(60)
        with pytest.raises(ValueError, match="contiguous"):
            moves.load([b"k"], [np.zeros((4, 4), np.uint8)[:, ::2]])
    with pytest.raises(TierClosed):
        moves.load(keys, [np.zeros(4096, np.uint8)] * 3)
    with pytest.raises(ValueError, match="threads"):
        Moves(MemoryTier(1, 1), threads=0)


def test_stores_that_end_while_a_commit_runs_share_the_next() -> None:
    """And transfers go on meanwhile: a slow sync stops nobody."""
    syncing, go_on = threading.Semaphore(0), threading.Event()

    class SlowSync(TierWrapper):
        commits = 0

        def commit(self) -> None:
            self.commits += 1
            syncing.release()
            assert go_on.wait(60)
            super().commit()

    tier, ended = SlowSync(MemoryTier(40, 4096)), []
    with Moves(tier, threads=2) as moves:
        first = moves.store(*batch(1), then=ended.append)
        assert syncing.acquire(timeout=60)
        others = [moves.store(*batch(2, first=2 * i), then=ended.append) for i in range(1, 8)]
        load = moves.load(*batch(1))
        assert load.wait(60)
        while moves.waiting_bytes:
            time.sleep(0.001)
        assert not ended
        assert not any(move.wait(0) for move in (first, *others))
        go_on.set()
        assert all(move.wait(60) and all(move.held) for move in (first, *others))
    assert tier.commits == 2
    assert ended[0] is first
    assert set(ended) == {first, *others}


def test_threads_are_few() -> None:
    gc.collect()  # the threads of other tests' stores
    before = set(threading.enumerate())
    with Moves(MemoryTier(100, 4096), threads=3) as moves:
        done = [moves.store(*batch(10, first=10 * i)) for i in range(10)]
        assert len(set(threading.enumerate()) - before) == 4
        assert all(move.wait(60) for move in done)
    assert not set(threading.enumerate()) - before


def test_meter_counts_overlapping_time_once() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    assert meter.bytes_per_second is None
    with meter.running() as first, meter.running() as second:
        now[0] = 1.0
        first(600)
        second(400)
    assert meter.bytes_per_second == pytest.approx(1000)
    now[0] = 100.0  # idle time counts nothing
    for _ in range(3):
        with meter.running() as moved:
            now[0] += 1.0
            moved(10)
    assert meter.bytes_per_second < 20, "the disk became slow, and it follows"


def test_the_cheaper_way_is_chosen() -> None:
    speed = PrefillSpeed.fit([(1000, 0, 1.1), (1000, 4000, 1.9), (2000, 0, 2.4)])
    exact = PrefillSpeed(1e-3, 2e-7)
    assert speed.seconds(1000) == pytest.approx(1.1, rel=1e-3)
    assert PrefillSpeed.fit([(100, 0, 1.0)]) == PrefillSpeed(0.01)
    near = fetch_or_recompute(1000, 131072, exact, 1e9)
    assert near.fetch
    assert near.fetch_seconds == pytest.approx(0.131072)
    assert near.recompute_seconds == pytest.approx(1.0999)
    assert not fetch_or_recompute(1000, 131072, exact, 1e8).fetch
    assert not fetch_or_recompute(1000, 131072, exact, 1e9, waiting_bytes=2 * 10**9).fetch
    assert fetch_or_recompute(1000, 131072, exact, 1e8, after=5000).fetch
    assert fetch_or_recompute(1000, 131072, exact, None).fetch, "unknown: try it"
    with pytest.raises(ValueError, match="at least one"):
        PrefillSpeed.fit([])
