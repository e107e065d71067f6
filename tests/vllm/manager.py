"""vLLM's real TieringOffloadingManager over `PlaitTier`, without an engine: run as a program, in a folder.

python manager.py FOLDER        -> one line of JSON after "RESULT "
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 64 << 10
ROOM = 4  # chunks in vLLM's CPU tier


def make_manager(folder: Path, **tier: Any) -> Any:
    """A manager with our tier below it; `model` is what PlaitOffloadingConnector would fill in."""
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    ours = {
        "type": "PlaitTier",
        "module_path": "plait.kvstore.engines.vllm_tier",
        "path": str(folder / "tier"),
        "max_bytes": "4MiB",
        "model": "toy",
        **tier,
    }
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("l0",), 0),),
        worker_kv_bytes_per_block=CHUNK,
        enable_kv_cache_events=True,
        extra_config={"cpu_bytes_to_use": ROOM * CHUNK, "secondary_tiers": [ours]},
        engine_id=f"plait-test-{os.getpid()}-{time.monotonic_ns()}",
        model=OffloadingModelConfig("toy", "bfloat16"),
        cache=OffloadingCacheConfig(16, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )
    return TieringOffloadingSpec(config).get_manager()


class Driver:
    """Calls a manager as vLLM's scheduler does."""

    def __init__(self, folder: Path, **tier: Any) -> None:
        from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext

        self.manager = make_manager(folder, **tier)
        (self.tier,) = self.manager.secondary_tiers
        self.request = ReqContext("r")
        self.manager.on_new_request(self.request)
        self._end = ScheduleEndContext(set(), set())

    @property
    def memory(self) -> Any:
        """The primary tier's chunks, as our tier sees them."""
        return self.tier._chunks

    def step(self, until: Callable[[], bool]) -> bool:
        """Steps of the scheduler until something is so, for at most a minute."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.manager.on_schedule_end(self._end)
            if until():
                return True
            time.sleep(0.005)
        return False

    def idle(self) -> bool:
        return not self.manager.has_pending_work()

    def store(self, number: int) -> None:
        """Keep a chunk full of a number."""
        key = key_of(number)
        output = self.manager.prepare_store([key], self.request)
        assert output is not None
        self.memory[int(output.store_spec.block_ids[0])] = number + 1
        self.manager.complete_store([key], self.request, True)
        assert self.step(self.idle)

    def load(self, *numbers: int) -> list[str]:
        """Say of each chunk whether it is given, and is right."""
        keys = [key_of(number) for number in numbers]
        from vllm.v1.kv_offload.base import LookupResult

        known: dict[bytes, Any] = {}

        def settled() -> bool:
            known.update((key, self.manager.lookup(key, self.request)) for key in keys)
            return all(result in (LookupResult.HIT, LookupResult.MISS) for result in known.values())

        assert self.step(settled)
        return [self._said(number, known[key_of(number)].name) for number in numbers]

    def _said(self, number: int, found: str) -> str:
        if found != "HIT":
            return found
        spec = self.manager.prepare_load([key_of(number)], self.request)
        right = bool((self.memory[int(spec.block_ids[0])] == number + 1).all())
        self.manager.complete_load([key_of(number)], self.request)
        return "right" if right else "WRONG"


def key_of(number: int) -> Any:
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(hashlib.sha256(bytes([number])).digest(), 0)


def flip(folder: Path, number: int) -> None:
    """Spoil the page of a chunk, found by its content."""
    (slab,) = (folder / "tier").glob("slab-*")
    content = bytearray(slab.read_bytes())
    at = content.find(bytes([number + 1]) * CHUNK)
    assert at > 0
    with slab.open("r+b") as file:
        file.seek(at + 77)
        file.write(b"\0")


def jobs(driver: Driver) -> dict[str, Any]:
    """The tier's own calls: what is said of jobs, and when."""
    import numpy as np
    from vllm.v1.kv_offload.tiering.base import TransferJob

    tier, request = driver.tier, driver.request
    keys = [key_of(200), key_of(201)]
    driver.memory[:2] = np.array([[201], [202]], np.uint8)
    tier.submit_store(TransferJob(9001, keys, np.array([0, 1]), False, request))
    said = {"while storing": tier.lookup(keys[0], request).name}
    tier.drain_jobs()
    (stored,) = tier.get_finished_jobs()
    said["stored"] = [stored.success, stored.transfer_bytes]
    said["then"] = tier.lookup(keys[0], request).name
    tier._tier.remove([tier._key(keys[1])])
    tier.submit_load(TransferJob(9002, keys, np.array([2, 3]), True, request))
    tier.drain_jobs()
    (loaded,) = tier.get_finished_jobs()
    said["in part"] = [loaded.success, list(loaded.successful_keys) == keys[:1]]
    said["bytes"] = [int(driver.memory[2].min()), int(driver.memory[2].max())]
    return said


def main() -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    folder = Path(sys.argv[1])
    driver = Driver(folder)
    for number in range(8):
        driver.store(number)
    result: dict[str, Any] = {
        "vllm": __import__("vllm").__version__,
        "given": [said for number in range(8) for said in driver.load(number)],
        "unknown": driver.load(100),
        "jobs": jobs(driver),
    }
    driver.manager.shutdown()

    driver = Driver(folder)
    flip(folder, 3)
    result["restarted"] = [said for number in range(8) for said in driver.load(number)]
    result["damaged"] = driver.tier.counters()["damaged"]
    stats = driver.manager.get_stats()
    names = [name for name in stats.data["data"] if name.startswith("plait")]
    result["metrics known"] = set(names) <= set(type(driver.tier).build_metric_definitions({}))
    result["metrics"] = len(names)
    driver.store(3)
    for number in range(20, 90):
        driver.store(number)
    result["after many"] = [driver.load(0), driver.load(89)]
    result["evicted"] = driver.tier.counters()["evicted"] > 0
    driver.manager.shutdown()

    driver = Driver(folder, model="another")
    result["another model"] = driver.load(89)
    driver.manager.shutdown()
    driver = Driver(folder / "small", backlog_bytes=1)
    driver.store(5)
    result["no room to wait"] = driver.tier.counters()["refused"]
    driver.manager.shutdown()
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
