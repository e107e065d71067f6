"""The whole store with tiers against a dictionary: every tier fails, power is cut, clocks jump, moves are given up."""

from __future__ import annotations

import contextlib
import random
import time

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from plait.kvstore import KVSpec, KVStore
from plait.kvstore.testing import PROMPTS, TENANTS, StoreMachine
from plait.kvstore.tiers import DiskTier, FailTier, MemoryTier, Tier, TierError, TierWrapper
from plait.kvstore.tiers.faults import FaultyDisk, FaultyFolder

SECRET = bytes(range(32))
PAGE = 4096
OPERATIONS = ("read", "write", "sync", "sync_names", "create", "rename", "preallocate")
COUNTS = dict.fromkeys(
    ("flips", "faults", "cuts", "kills", "jumps", "given up", "files deleted", "slow calls", "promises kept"), 0
)  # fmt: skip


class Slow(TierWrapper):
    """A tier that is slow at times: other moves overtake."""

    def __init__(self, inner: Tier, seed: int) -> None:
        super().__init__(inner)
        self._draw = random.Random(seed)

    def around(self, name, pages, call, count):
        if self._draw.random() < 0.1:
            COUNTS["slow calls"] += 1
            time.sleep(0.002)
        return call()


class TieredMachine(StoreMachine):
    """A host tier that lies, forgets and refuses, over a disk tier on a disk that fails; see `StoreMachine`.

    A promise is a prompt that was flushed while nothing was harmed: it must be found after every crash. Its pages
    must be right at all times, which the dictionary sees at every step.
    """

    def __init__(self) -> None:
        self.disk, self.draw, self.jump = FaultyDisk(), random.Random(0), 0.0
        self.promises: list[tuple[str | None, list[int]]] = []
        self.harmed = self.harmful = False
        self.seed = 0
        super().__init__()

    def make_store(self, spec: KVSpec) -> KVStore:
        self.seed += 1
        host = FailTier(MemoryTier(6, PAGE), self.seed, misses=0.1, refusals=0.2, flips=0.1)
        tier = DiskTier(FaultyFolder(self.disk), page_bytes=PAGE, max_bytes=2 << 20)
        disk = Slow(tier, self.seed)
        return KVStore(
            spec, num_pages=2, device_bytes=24 * spec.bytes_per_page, evict=self.policy, fetch="always",
            secret=SECRET, tiers={"host": host, "disk": disk}, clock=lambda: time.monotonic() + self.jump,
        )  # fmt: skip

    def check_found(self, cached: list[int], matched: list[int]) -> None:
        """Faults may shorten it, and pages that were under way may have arrived."""

    def _harm(self) -> None:
        self.harmed = True
        self.promises.clear()

    @initialize(harmful=st.booleans())
    def begin(self, harmful: bool) -> None:
        """Half of the histories have a good disk, so that promises are made and must be kept."""
        self.harmful = harmful

    @precondition(lambda self: self.step is None)
    @rule(data=st.data(), tenant=TENANTS)
    def open_and_give_up(self, data, tenant: str | None) -> None:
        """Close prompts while their pages may be on their way."""
        if data.draw(st.booleans()):
            self.serve(data, tenant, 4, True)
            self.flush()
            self.store.evict()
        prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=3))
        seqs = self.store.open_batch(prompts, tenant, data.draw(st.sampled_from([None, 0.0, 1e-3])))
        COUNTS["given up"] += sum(seq.fetch is not None for seq in seqs)
        self.store.close(seqs)

    @rule(seconds=st.sampled_from([-1e6, 3600.0, -0.01]))
    def clock_jumps(self, seconds: float) -> None:
        self.jump += seconds
        COUNTS["jumps"] += 1

    @rule()
    def flush(self) -> None:
        struck = self.disk.struck
        assert self.store.flush(60)
        pages = self.store.spec.page_tokens
        if struck == self.disk.struck and not self.harmed and not self.disk.armed:
            for seq, mine in self.model.items():
                full = min(len(mine.ids or []), seq.length) // pages * pages
                if full:
                    self.promises.append((mine.tenant, list((mine.ids or [])[:full])))

    @precondition(lambda self: self.step is None)
    @rule(
        data=st.data(), how=st.sampled_from(["kill", "power cut", "shutdown"]), seed=st.integers(0, 2**32),
        tenant=TENANTS,
    )  # fmt: skip
    def restart(self, data, how: str, seed: int, tenant: str | None) -> None:
        """End the process in some way, often after a flush, and open the directory again."""
        if data.draw(st.booleans()):
            self.serve(data, tenant, 8, False)
            self.flush()
        struck = self.disk.struck
        if how == "kill":
            self.disk.kill()
            COUNTS["kills"] += 1
        elif how == "power cut":
            self.disk.power_cut(random.Random(seed))
            COUNTS["cuts"] += 1
        with contextlib.suppress(TierError):
            self.store.shutdown(0.0 if how != "shutdown" else 60.0)
        if self.disk.struck > struck:
            self._harm()
        self.closed.extend(self.model)
        self.model.clear()
        self.closed.clear()
        self.disk.kill()
        self.store = self.make_store(self.spec)
        for tenant, ids in self.promises:
            assert self.store.match([[*ids, 7]], tenant)[0] >= len(ids), "a flushed page was lost"
            COUNTS["promises kept"] += 1
        self.harmed = False

    @precondition(lambda self: self.harmful)
    @rule(
        operation=st.sampled_from(OPERATIONS), after=st.integers(0, 3),
        kind=st.sampled_from(["EIO", "ENOSPC", "short"]),
    )  # fmt: skip
    def arm(self, operation: str, after: int, kind: str) -> None:
        """The next such call of the disk fails."""
        self._harm()
        COUNTS["faults"] += 1
        self.disk.armed[operation] = after, kind if operation in ("read", "write") else "EIO"

    # What is drawn may not depend on the files, which other threads make: a fault without a file does nothing.

    @precondition(lambda self: self.harmful)
    @rule(name=st.sampled_from(["index", "slab-00000"]), place=st.integers(0, 2**32))
    def flip(self, name: str, place: int) -> None:
        """A bit on the disk turns over."""
        file = self.disk.names.get(name)
        if file is not None and (size := min(len(file.current), 40 * 8192)):
            self._harm()
            COUNTS["flips"] += 1
            self.disk.flip(name, place % (8 * size))

    @precondition(lambda self: self.harmful)
    @rule(name=st.sampled_from(["index", "lock", "slab-00000"]))
    def delete(self, name: str) -> None:
        """Somebody deletes a file under the open store."""
        if name in self.disk.names:
            self._harm()
            COUNTS["files deleted"] += 1
            self.disk.delete(name)

    def teardown(self) -> None:
        """Also: everything was said to the tiers, and every row and page given back."""
        self.disk.armed.clear()
        super().teardown()
        assert self.store.placement is not None
        outbox = self.store.placement.outbox
        assert self.store.flush(60)
        assert sorted(outbox._rows) == list(range(len(outbox._stage.bytes)))
        with contextlib.suppress(TierError):
            self.store.shutdown()


def run(examples: int, steps: int, machine: type[TieredMachine] = TieredMachine) -> None:
    search = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=search)


def test_the_store_with_failing_tiers_against_a_dictionary() -> None:
    run(60, 30)
    assert min(COUNTS.values()) > 0, COUNTS


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(1000, 40)
    print(*(f"{name:24}{count:>10}" for name, count in COUNTS.items()), sep="\n")
