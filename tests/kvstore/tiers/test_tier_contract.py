"""Every tier and wrapper against the shipped contract; the wrappers' own promises; what the contract catches."""

from __future__ import annotations

import itertools
import logging
import time

import numpy as np
import pytest

from plait.kvstore.tiers import (
    CountTier,
    FailTier,
    Fifo,
    LimitTier,
    LogTier,
    MemoryTier,
    TierError,
    TierStack,
    TierWrapper,
    VerifyTier,
)
from plait.kvstore.tiers.choice import Meter
from plait.kvstore.tiers.testing import TierConformance, sample
from plait.kvstore.tiers.wrappers import prometheus_text


class TestMemoryTier(TierConformance):
    def make_tier(self, tmp_path):
        return MemoryTier(8, self.page_bytes)


class TestWrapped(TierConformance):
    """All wrappers on top of each other change nothing when nothing fails."""

    def make_tier(self, tmp_path):
        room = MemoryTier(8, self.page_bytes + VerifyTier.FOOTER_BYTES, evict=Fifo())
        return CountTier(LogTier(LimitTier(VerifyTier(FailTier(room, seed=0)), 1e12)))


class TestStack(TierConformance):
    """Two tiers as one, of which the upper forgets soon."""

    def make_tier(self, tmp_path):
        return TierStack(
            {"small": MemoryTier(2, self.page_bytes), "large": MemoryTier(20, self.page_bytes)}
        )


class Broken(TierWrapper):
    def around(self, name, pages, call, count):
        raise TierError("out of order")


def test_a_tier_that_raises_is_a_tier_that_misses() -> None:
    good = MemoryTier(4, 8)
    stack = TierStack({"bad": Broken(MemoryTier(4, 8)), "good": good})
    stack.meters["good"] = Meter(clock=itertools.count().__next__)
    assert stack.put([b"k"], [b"12345678"]) == [True]
    out = bytearray(8)
    assert (stack.get([b"k", b"l"], [out, bytearray(8)]), bytes(out)) == ([8, None], b"12345678")
    assert stack.where([b"k", b"l"]) == ["good", None]
    assert stack.seconds(["good", None], 8) is not None
    assert stack.seconds(["bad"], 8) is None, "nothing was measured of it"
    with pytest.raises(TierError, match="out of order"):
        stack.commit()
    assert stack.remove([b"k"]) == [True]
    assert stack.counters()["bad_errors"] >= 5
    with pytest.raises(ValueError, match="at least one"):
        TierStack({})


class Overwriting(TierWrapper):
    def put(self, keys, pages):
        self.inner.remove(keys)
        return self.inner.put(keys, pages)


class Forgetful(TierWrapper):
    def remove(self, keys):
        return self.inner.contains(keys)


class Sloppy(TierWrapper):
    def get(self, keys, out):
        found = self.inner.get(keys, out)
        return [0 if length is None else length for length in found]


@pytest.mark.parametrize("wrong", [Overwriting, Forgetful, Sloppy])
def test_the_contract_catches_a_wrong_tier(wrong, tmp_path) -> None:
    suite = TestMemoryTier()
    failed = []
    for name in dir(suite):
        if name.startswith("test_") and name != "test_threads":
            try:
                getattr(suite, name)(wrong(suite.make_tier(tmp_path)))
            except (AssertionError, pytest.fail.Exception):
                failed.append(name)
    assert failed


def test_a_flipped_bit_is_a_miss_behind_verify_and_wrong_without() -> None:
    made = [sample(i, 500) for i in range(200)]
    for verified in (True, False):
        broken = FailTier(MemoryTier(200, 516), seed=3, flips=0.3, misses=0.1, refusals=0.1)
        tier = VerifyTier(broken) if verified else broken
        kept = tier.put([key for key, _ in made], [page for _, page in made])
        wrong = hits = 0
        for key, page in made:
            out = np.zeros(500, np.uint8)
            if tier.get([key], [out]) != [None]:
                hits += 1
                wrong += not np.array_equal(out, page)
        assert 0 < kept.count(False) < 60
        assert 50 < hits < 190
        assert (wrong == 0) == verified
        counters = tier.counters()
        assert counters["injected"] > 60
        if verified:
            assert counters["unverified"] > 30


def test_fail_is_the_same_with_the_same_seed() -> None:
    def run() -> list[bool]:
        tier = FailTier(MemoryTier(50, 8), seed=7, refusals=0.5)
        return tier.put([bytes([i + 1]) for i in range(50)], [b"page"] * 50)

    assert run() == run()
    with pytest.raises(TierError, match="asked for"):
        FailTier(MemoryTier(1, 8), seed=0, errors=1).commit()


def test_limit_holds_the_rate() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    tier = LimitTier(MemoryTier(4, 1000), 1000, burst_bytes=500, clock=lambda: now[0], sleep=sleep)
    tier.put([b"a"], [bytes(500)])
    assert slept == []  # the burst
    for _ in range(4):
        tier.get([b"a"], [bytearray(500)])
    assert now[0] == pytest.approx(2.0)
    now[0] += 100
    tier.get([b"a"], [bytearray(500)])
    tier.get([b"a"], [bytearray(500)])
    assert slept[-1] == pytest.approx(0.5)  # idle time earns one burst, no more
    assert tier.contains([b"a"]) == [True]
    with pytest.raises(ValueError, match="bytes_per_second"):
        LimitTier(tier, 0)


class Tick(TierWrapper):
    """Lasts until the clock moves, however coarse it is."""

    def around(self, name, pages, call, count):
        begin = time.perf_counter()
        while time.perf_counter() == begin:
            time.sleep(0.001)
        return call()


def test_count_and_prometheus() -> None:
    tier = CountTier(Tick(MemoryTier(2, 100)))
    tier.put([b"a", b"b", b"c"], [bytes(100), bytes(60), bytes(40)])
    tier.get([b"a", b"b", b"c"], [bytearray(100) for _ in range(3)])
    counters = tier.counters()
    want = {"hits": 2, "misses": 1, "get_bytes": 100, "put_bytes": 200, "evicted": 1, "pages": 2}
    assert {name: counters[name] for name in want} == want
    assert counters["put_calls"] == 1
    assert counters["get_seconds"] > 0
    text = prometheus_text({"hits": 2, "get_seconds": 0.5}, 'a"b')
    assert text == 'plait_tier_get_seconds{tier="a\\"b"} 0.5\nplait_tier_hits{tier="a\\"b"} 2\n'


def test_log_names_no_key(caplog) -> None:
    tier = LogTier(MemoryTier(2, 100))
    with caplog.at_level(logging.DEBUG, "plait.kvstore.tiers.wrappers"):
        tier.put([b"secret"], [bytes(9)])
        with pytest.raises(ValueError):
            tier.put([b""], [bytes(9)])
    assert [r.getMessage().rsplit(" in ", 1)[0] for r in caplog.records] == [
        "put of 1 pages done",
        "put of 1 pages failed",
    ]


def test_memory_evicts_in_order() -> None:
    lru, fifo = MemoryTier(2, 8), MemoryTier(2, 8, evict=Fifo())
    for tier, gone in ((lru, b"b"), (fifo, b"a")):
        tier.put([b"a", b"b"], [b"1", b"2"])
        tier.get([b"a"], [bytearray(8)])
        tier.put([b"c"], [b"3"])
        assert tier.contains([gone, b"c"]) == [False, True]
        assert tier.counters() == {"pages": 2, "evicted": 1}

    class Keep(Fifo):
        def victim(self) -> None:
            return None

    full = MemoryTier(1, 8, evict=Keep())
    assert full.put([b"a", b"b"], [b"1", b"2"]) == [True, False]
