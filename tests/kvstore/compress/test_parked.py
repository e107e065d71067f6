"""Tiers below a compressed store: what is parked or demoted comes back bit for bit, or is a miss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conversation import fed

from plait.kvstore import CompressedStore, KVSpec, PoolExhausted, StepError
from plait.kvstore.compress.depot import CHUNK_BYTES, Depot
from plait.kvstore.compress.prefixes import STRIDE
from plait.kvstore.tiers import FailTier, MemoryTier

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=8, page_tokens=8, dtype=torch.bfloat16)


IDS = torch.randint(0, 64, (700,), generator=torch.Generator().manual_seed(1)).tolist()
KINDS = {
    "queries": {"scorer": "snapkv:window=4,budget=0.5,every=8"},
    "attention received": {"scorer": "h2o:budget=40"},
    "heads of their own": {"scorer": "snapkv:window=4,budget=0.4,rule=ada"},
    "codec": {"scorer": "knorm:budget=0.8", "codec": "none@0.2|int8@0.3|int4:group=8"},
    "water-filled": {"scorer": "snapkv:window=4,rule=waterfill", "codec": "none|int8|int4:group=8"},
    "selector": {"scorer": "knorm:budget=0.8", "selector": "quest:budget=0.3,page=4,dense=0"},
    "not chosen yet": {"scorer": "kvzip:budget=0.5"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_parked_conversation_goes_on_bit_for_bit(kind, where, tmp_path) -> None:
    options = KINDS[kind]
    below = {"host_bytes": "4MiB"} if where == "host" else {"disk": tmp_path, "disk_bytes": "8MiB"}
    store, plain = CompressedStore(SPEC, **options, **below), CompressedStore(SPEC, **options)
    seq, other = store.open(), plain.open()
    fed(store, seq, IDS, [90, *[1] * 9])
    fed(plain, other, IDS, [90, *[1] * 9])
    assert store.park(seq, "talk", tenant="a")
    assert seq.closed
    assert store.report()["held_bytes"] == 0
    assert store.resume("talk") is None, "another tenant's"
    assert store.resume("talk", tenant="b") is None
    assert store.resume("tal", tenant="a") is None
    if where == "disk":  # another process
        store.shutdown()
        store = CompressedStore(SPEC, **options, disk=tmp_path)
    again = store.resume("talk", tenant="a")
    assert again is not None
    assert (again.kept == other.kept).all()
    if kind == "not chosen yet":
        store.choose(again)
        plain.choose(other)
    else:
        more = [*[1] * 20] if "codec" in options else [*[1] * 20, 30, 1]
        for x, y in zip(fed(store, again, IDS, more), fed(plain, other, IDS, more), strict=True):
            assert torch.equal(x, y)
    assert (again.kept == other.kept).all()
    store.check_integrity()


def test_another_composition_or_part_finds_nothing(tmp_path) -> None:
    store = CompressedStore(SPEC, "knorm:budget=0.5", disk=tmp_path, disk_bytes="8MiB")
    seq = store.open()
    fed(store, seq, IDS, [60])
    assert store.park(seq, "talk")
    store.shutdown()
    for options in (
        {"scorer": "knorm:budget=0.4"},
        {"scorer": "knorm:budget=0.5", "codec": "int8"},
    ):
        other = CompressedStore(SPEC, **options, disk=tmp_path)
        assert other.resume("talk") is None
        other.shutdown()
    with pytest.raises(StepError, match="give it host_bytes="):
        CompressedStore(SPEC, "knorm").resume("talk")


def test_parked_again_is_the_newer_and_a_full_pool_keeps_it() -> None:
    page = SPEC.bytes_per_page // 4
    store = CompressedStore(SPEC, "knorm:budget=1.0", host_bytes="2MiB", device_bytes=40 * page)
    seq = store.open()
    fed(store, seq, IDS, [40])
    assert store.park(seq, "talk")
    seq = store.resume("talk")
    assert seq is not None
    fed(store, seq, IDS, [1] * 10)
    assert store.park(seq, "talk")
    hog = store.open()
    fed(store, hog, IDS, [70])
    with pytest.raises(PoolExhausted):
        store.resume("talk")
    store.check_integrity()
    store.close(hog)
    seq = store.resume("talk")
    assert seq is not None
    assert seq.tokens == 50
    store.check_integrity()


def test_what_does_not_fit_below_stays_open() -> None:
    store = CompressedStore(SPEC, "knorm:budget=1.0", tiers={"small": MemoryTier(1, CHUNK_BYTES)})
    seq = store.open()
    fed(store, seq, IDS, [700])
    assert not store.park(seq, "talk")
    assert not seq.closed
    assert store.resume("talk") is None
    store.close(seq)


def test_texts_move_below_for_room_and_come_back(tmp_path) -> None:
    text, question = IDS[:600], [3, 7, 1, 40]
    options = {"scorer": "keydiff:budget=0.3", "codec": "int8"}
    store = CompressedStore(SPEC, **options, disk=tmp_path, disk_bytes="16MiB")
    seq = store.open(text, tenant="a")
    fed(store, seq, text, [600])
    store.close(seq)
    assert store.flush() == 1
    assert store.flush() == 0, "it is there"
    assert store.evict() == 1
    assert store.report()["held_bytes"] == 0
    want = CompressedStore(SPEC, **options)
    other = want.open(text, tenant="a")
    fed(want, other, text, [600])
    other = want.open(text + question, tenant="a")
    assert other.cached_tokens == 600
    store.shutdown()
    store = CompressedStore(SPEC, **options, disk=tmp_path)
    assert store.open(text + question, tenant="b").cached_tokens == 0
    assert store.open([*text[:-1], text[-1] ^ 1, 5], tenant="a").cached_tokens == 0
    assert store.open(text, tenant="a").cached_tokens == 0, "one token is left to compute"
    found = store.open(text + question, tenant="a")
    assert found.cached_tokens == 600
    both = (fed(s, x, text + question, [4]) for s, x in ((store, found), (want, other)))
    assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))
    assert store.open(text + question, tenant="a").cached_tokens >= 600, "from the pool now"
    store.check_integrity()


@pytest.mark.parametrize("damage", ["flip", "cut", "another chunk"])
def test_a_damaged_parcel_is_a_miss(damage, tmp_path) -> None:
    class Lying(MemoryTier):
        def get(self, keys, out):
            found = super().get(keys, out)
            for at, length in enumerate(found):
                if length is None or at == 0:
                    continue
                if damage == "flip":
                    out[at][length // 2] ^= 4
                elif damage == "cut":
                    found[at] = length - 1
                else:
                    found[at] = super().get([kept[-1]], [out[at]])[0]
            return found

        def put(self, keys, pages):
            kept.extend(keys)
            return super().put(keys, pages)

    kept: list[bytes] = []
    depot = Depot({"lying": Lying(8, CHUNK_BYTES)})
    data = np.random.default_rng(0).bytes(3 * CHUNK_BYTES)
    assert depot.put(b"key", data)
    assert depot.get(b"key") is None
    assert depot.counts["missed"] == 1
    honest = Depot({"honest": MemoryTier(8, CHUNK_BYTES)})
    assert honest.put(b"key", data)
    assert honest.get(b"key") == data
    assert honest.put(b"key", data[:100])
    assert honest.get(b"key") == data[:100]
    honest.remove(b"key")
    assert honest.get(b"key") is None


def test_a_failing_tier_is_a_miss_and_the_text_is_computed() -> None:
    tier = FailTier(MemoryTier(64, CHUNK_BYTES), seed=0, flips=1.0)
    store = CompressedStore(SPEC, "keydiff:budget=0.3", tiers={"bad": tier})
    seq = store.open(IDS[: STRIDE + 9])
    fed(store, seq, IDS, [STRIDE + 9])
    store.close(seq)
    store.evict()
    assert store.open(IDS).cached_tokens == 0


def test_a_store_that_was_shut_down_goes_on_without_tiers(tmp_path) -> None:
    with CompressedStore(SPEC, "knorm:budget=0.5", disk=tmp_path, disk_bytes="8MiB") as store:
        fed(store, store.open(), IDS, [40])
    store.shutdown()
    seq = store.open()
    fed(store, seq, IDS, [40])
    with pytest.raises(StepError, match="no tiers to park in"):
        store.park(seq, "talk")
    CompressedStore(SPEC, "knorm:budget=0.5", disk=tmp_path).shutdown()  # its lock was given back
