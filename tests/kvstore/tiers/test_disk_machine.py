"""The disk tier against a dictionary, on a disk that loses power, flips bits, fails and forgets.

For every key the dictionary knows what may come back (`allowed`: anything else is a wrong byte), what must be
there now (`current`), and what must survive a power cut (`durable`: anything less is a lost page).
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from plait.kvstore.errors import StoreError
from plait.kvstore.tiers import DiskTier, Lru, TierError
from plait.kvstore.tiers import form as form_module
from plait.kvstore.tiers import index as index_module
from plait.kvstore.tiers import pages as pages_module
from plait.kvstore.tiers import recovery as recovery_module
from plait.kvstore.tiers.faults import FaultyDisk, FaultyFolder
from plait.kvstore.tiers.slabs import SLAB_NAME

PAGE = 5000
SLOT = 4096 + 8192
KEYS = [f"key{i}".encode() for i in range(12)]
OPERATIONS = ("read", "write", "sync", "sync_names", "create", "rename", "preallocate", "unlink")


class Watched(Lru):
    """An order that tells which pages it gave up."""

    def __init__(self) -> None:
        super().__init__()
        self.victims: list[bytes] = []

    def victim(self) -> bytes | None:
        victim = super().victim()
        if victim is not None:
            self.victims.append(victim[form_module.FORM_DIGEST_BYTES :])
        return victim


class DiskMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.disk = FaultyDisk()
        self.allowed: dict[bytes, set[bytes]] = {key: set() for key in KEYS}
        self.current: dict[bytes, bytes] = {}
        self.durable: dict[bytes, bytes] = {}
        self.gone: dict[bytes, set[bytes]] = {key: set() for key in KEYS}
        self.number = 0
        self.open()

    def open(self) -> None:
        self.order = Watched()
        self.deleted = False  # a file that the tier has open
        self.tier = DiskTier(
            FaultyFolder(self.disk),
            page_bytes=PAGE,
            max_bytes=2 * (4096 + 4 * SLOT),
            evict=self.order,
        )
        assert not any(name.endswith(".new") for name in self.disk.names)

    def note_victims(self) -> None:
        for key in self.order.victims:
            self.forget(key)
        self.order.victims.clear()

    def forget(self, key: bytes) -> None:
        """A page went, but until a commit it may come back."""
        for where in (self.current, self.durable):
            if key in where:
                self.gone[key].add(where.pop(key))

    @rule(key=st.sampled_from(KEYS), length=st.sampled_from([1, 100, 4096, PAGE]))
    def put(self, key: bytes, length: int) -> None:
        self.number += 1
        value = random.Random(self.number).randbytes(length)
        held, struck = self.tier.contains([key])[0], self.disk.struck
        (kept,) = self.tier.put([key], [value])
        self.note_victims()
        if not held:
            self.forget(key)
            if kept:
                self.current[key] = value
                self.allowed[key].add(value)
            else:
                full = self.tier.counters()["growth_refused"]
                assert self.disk.struck > struck or full, "a page was refused without a reason"
                self.allowed[key].add(value)  # a torn write may have left it whole
        assert kept or not held

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True))
    def get(self, keys: list[bytes]) -> None:
        out = [np.full(PAGE, 170, np.uint8) for _ in keys]
        struck = self.disk.struck
        for key, buffer, length in zip(keys, out, self.tier.get(keys, out), strict=True):
            if length is None:
                assert key not in self.current or self.disk.struck > struck, "a page was lost"
                self.forget(key)
            else:
                value = buffer[:length].tobytes()
                assert value in self.allowed[key], "a wrong byte"
                assert self.current.get(key, value) == value, "a stale page"
                if not self.deleted:  # else it may be there only as long as its file is open
                    self.current[key] = value
        self.note_victims()

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        held = self.tier.contains([key])
        assert self.tier.remove([key]) == held
        assert held[0] or key not in self.current
        self.forget(key)
        assert self.tier.contains([key]) == [False]

    @rule()
    def commit(self) -> None:
        struck = self.disk.struck
        try:
            self.tier.commit()
        except TierError:
            assert self.disk.struck > struck or self.deleted
            for key in list(self.current):
                if self.durable.get(key) != self.current[key] and not self.tier.contains([key])[0]:
                    self.forget(key)
            return
        for key in list(self.current) if self.deleted else ():
            if not self.tier.contains([key])[0]:  # it was in the file that is gone
                self.forget(key)
        self.committed()

    def committed(self) -> None:
        for key in KEYS:
            self.allowed[key] -= self.gone[key]
            self.gone[key].clear()
            if key in self.current:
                self.durable[key] = self.current[key]

    @rule()
    def reopen(self) -> None:
        struck = self.disk.struck
        if self.deleted:
            self.commit()
        try:
            self.tier.close()
            self.committed()
        except TierError:
            assert self.disk.struck > struck or self.deleted
            self.current = dict(self.durable)
        self.disk.kill()
        self.open()

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        self.disk.power_cut(random.Random(seed))
        self.crashed()

    @rule()
    def kill(self) -> None:
        self.disk.kill()
        self.crashed()

    def crashed(self) -> None:
        for key in KEYS:
            self.gone[key].clear()
        self.current = {
            key: value for key, value in self.durable.items() if self.current.get(key) == value
        }
        self.durable = dict(self.current)
        self.open()

    @rule(
        operation=st.sampled_from(OPERATIONS),
        after=st.integers(0, 3),
        kind=st.sampled_from(["EIO", "ENOSPC", "short"]),
    )
    def arm(self, operation: str, after: int, kind: str) -> None:
        self.disk.armed[operation] = after, kind if operation in ("read", "write") else "EIO"

    def disturb(self, slots: range) -> None:
        """Pages in these slots may be misses from now on; they may not be wrong."""
        for record in self.tier._opened.catalog.records():
            if record.slot in slots:
                key = record.key[form_module.FORM_DIGEST_BYTES :]
                self.current.pop(key, None)
                self.durable.pop(key, None)

    @rule(data=st.data())
    def flip(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk.names)))
        size = len(self.disk.names[name].current)
        if not size:
            return
        if name == "index":  # most of it is room for more lines
            size = 4096 + 128 * (self.tier._opened.index.lines + 1)
        byte = data.draw(st.integers(0, size - 1))
        self.disk.flip(name, 8 * byte + data.draw(st.integers(0, 7)))
        if SLAB_NAME.fullmatch(name) and byte >= 4096:
            slot = 4 * int(name[5:]) + (byte - 4096) // SLOT
            self.disturb(range(slot, slot + 1))

    @precondition(lambda self: len(self.disk.names) > 1)
    @rule(data=st.data(), cut=st.booleans())
    def lose_file(self, data, cut: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk.names)))
        if cut:
            size = len(self.disk.names[name].current)
            even = data.draw(st.booleans())  # files grow by chunks: a cut there leaves no half line
            at = data.draw(st.integers(0, size))
            self.disk.truncate(name, at - at % index_module.CHUNK if even else at)
        else:
            self.disk.delete(name)
            self.deleted = True
        if SLAB_NAME.fullmatch(name):
            self.disturb(range(4 * int(name[5:]), 4 * int(name[5:]) + 4))

    @invariant()
    def slots_add_up(self) -> None:
        self.tier.check_integrity()

    def teardown(self) -> None:
        self.get(KEYS)
        self.disk.power_cut(random.Random(0))
        self.crashed()
        self.get(KEYS)


def run(examples: int, steps: int) -> None:
    search = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(DiskMachine, settings=search)


@pytest.fixture(autouse=True)
def small_files(monkeypatch) -> None:
    """Two slabs, an index that is soon rewritten, little staging."""
    monkeypatch.setattr(pages_module, "RUN_BYTES", 3 * SLOT)
    monkeypatch.setattr(recovery_module, "SLAB_BYTES", 4096 + 4 * SLOT)
    monkeypatch.setattr(index_module, "CHUNK", 8192)
    monkeypatch.setattr(index_module, "SPARE_LINES", 8)


def test_disk_tier_against_a_dictionary() -> None:
    run(300, 30)


PRECAUTIONS = {
    "sync of slabs": ("slabs.Slabs.sync", lambda self, number: None),
    "any sync": ("faults.FaultyFolder.sync", lambda self, handle: None),
    "sync of names": ("faults.FaultyFolder.sync_names", lambda self: None),
}


@pytest.mark.parametrize("precaution", PRECAUTIONS)
def test_the_dictionary_catches_a_tier_without(precaution: str, monkeypatch) -> None:
    where, instead = PRECAUTIONS[precaution]
    monkeypatch.setattr(f"plait.kvstore.tiers.{where}", instead)
    with pytest.raises((AssertionError, StoreError)):
        run(500, 30)
