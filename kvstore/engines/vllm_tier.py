"""vLLM's offloading over the disk tier: a secondary tier for `TieringOffloadingSpec`.

    --kv-transfer-config '{"kv_connector": "PlaitOffloadingConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "plait.kvstore.engines.vllm_tier",
      "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "secondary_tiers": [{"type": "PlaitTier", "module_path": "plait.kvstore.engines.vllm_tier",
                             "path": "/var/cache/kv", "max_bytes": "200GiB"}]}}'

`PlaitOffloadingConnector` is vLLM's own OffloadingConnector; it tells the tier which model this is, which
vLLM's tier interface does not. docs/vllm.md is the user's page.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import parse_bytes
from ..tiers import DiskTier, Move, Moves, PageForm
from .vllm_held import HeldKeys
from .vllm_model import DEFAULT_SECRET, PageKeys, fingerprint, model_digest, require_vllm

require_vllm()

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (  # noqa: E402
    OffloadingConnectorStats,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (  # noqa: E402
    OffloadingConnector,
)
from vllm.v1.kv_offload.base import (  # noqa: E402
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager  # noqa: E402

logger = logging.getLogger(__name__)
_PREFIX = "plait:kv_tier_"
_GAUGES = {"pages": "Pages in the directory."}
_COUNTERS = {
    "hits": "Pages that were given.",
    "missed_loads": "Pages that were looked up, but damaged or gone when they were read.",
    "damaged": "Pages found damaged; they were dropped.",
    "evicted": "Pages dropped to make room.",
    "refused": "Pages that were not stored.",
}


class PlaitTier(SecondaryTierManager):
    """Chunks of vLLM's primary (CPU) tier on disk: checked when read, durable when stored, of bounded size.

    A chunk that is damaged is a miss of that chunk; the others of its job are given.

    Args:
        path: the directory of the cache; one engine writes it.
        max_bytes: what it may take on disk.
        model: what names the model; `PlaitOffloadingConnector` fills it in.
        weights: what names the weights, see `model_digest`; used by `PlaitOffloadingConnector`.
        secret: 32 to 128 hex digits that no tenant knows.
        threads: transfers at a time.
        backlog_bytes: stores that may wait for the disk; more are refused, not waited for.

    State: calls come one at a time, under the manager's lock; none waits for the disk, but `drain_jobs`
        and `shutdown`.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        path: str,
        max_bytes: int | str,
        model: str | None = None,
        weights: str | None = None,
        secret: str | None = None,
        threads: int = 4,
        backlog_bytes: int | str = "1GiB",
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if model is None:
            raise ValueError(
                "PlaitTier must know the model, or it would give pages of other weights or RoPE settings, and "
                'vLLM does not tell tiers: use "kv_connector": "PlaitOffloadingConnector" with "kv_connector_'
                f'module_path": "{__name__}" instead of OffloadingConnector, or give the tier "model": a '
                "text that changes with weights and settings"
            )
        self._chunks = np.frombuffer(primary_kv_view, np.uint8).reshape(len(primary_kv_view), -1)
        self._keys = PageKeys(
            fingerprint([model, _offloading_facts(offloading_spec)]),
            bytes.fromhex(secret) if secret else DEFAULT_SECRET,
        )
        form = PageForm(identity=model, shape=(self._chunks.shape[1],))
        self._held = HeldKeys(form)
        self._tier = DiskTier(Path(path), form, self._chunks.shape[1], max_bytes, evict=self._held)
        self._backlog = parse_bytes(backlog_bytes)
        # we look at the backlog ourselves: `Moves` would wait for room
        self._moves = Moves(self._tier, threads, queue_bytes=1 << 62)
        self._jobs: dict[int, tuple[Any, Move | None]] = {}
        self._storing: dict[bytes, int] = {}
        self._failed: set[bytes] = set()  # could not be read, but may still be held
        self._counts = dict.fromkeys(("hits", "missed_loads", "refused"), 0)
        self._told: dict[str, float] = {}
        logger.info("plait tier at %s holds %d chunks for this model", path, len(self._held))

    def _key(self, offload_key: bytes) -> bytes:
        return self._keys.make(offload_key[:-4], int.from_bytes(offload_key[-4:], "big"))

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        """Say whether a chunk is held, from memory."""
        ours = self._key(key)
        if ours in self._storing:
            return LookupResult.RETRY
        known = ours in self._held and ours not in self._failed
        return LookupResult.HIT if known else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        """Begin to write a job's chunks, unless too much waits already."""
        keys, rows = self._batch(job_metadata)
        room = self._moves.waiting_bytes + sum(row.size for row in rows) <= self._backlog
        self._jobs[job_metadata.job_id] = (
            job_metadata,
            self._moves.store(keys, rows) if room else None,
        )
        if room:
            for key in keys:
                self._storing[key] = self._storing.get(key, 0) + 1

    def submit_load(self, job_metadata: Any) -> None:
        """Begin to read a job's chunks into the primary tier."""
        self._jobs[job_metadata.job_id] = job_metadata, self._moves.load(*self._batch(job_metadata))

    def _batch(self, job: Any) -> tuple[list[bytes], list[np.ndarray]]:
        return [self._key(key) for key in job.keys], [
            self._chunks[int(chunk)] for chunk in job.chunk_ids
        ]

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Give the jobs that ended since the last call."""
        ended = [number for number, (_, move) in self._jobs.items() if _ended(move)]
        return [self._result(number, *self._jobs.pop(number)) for number in ended]

    def _result(self, number: int, job: Any, move: Move | None) -> JobResult:
        held = [False] * len(job.keys) if move is None else move.held
        try:
            if move is not None:
                move.wait()
        except Exception:
            logger.exception("plait tier: a transfer failed; its chunks are misses")
        good = [key for key, yes in zip(job.keys, held, strict=True) if yes]
        if job.is_promotion:
            missed = (self._key(key) for key in set(job.keys) - set(good))
            self._failed.update(key for key in missed if key in self._held)
            self._counts["hits"] += len(good)
            self._counts["missed_loads"] += len(job.keys) - len(good)
        else:
            self._stored(job, move, good)
        whole = len(good) == len(job.keys)
        return JobResult(
            number,
            whole,
            successful_keys=None if whole else tuple(good),
            transfer_time=time.monotonic() - job.submit_time,
            transfer_bytes=len(good) * self._chunks.shape[1],
        )

    def _stored(self, job: Any, move: Move | None, good: list[bytes]) -> None:
        self._failed.difference_update(self._key(key) for key in good)
        self._counts["refused"] += len(job.keys) - len(good)
        for key in () if move is None else move.keys:
            self._storing[key] -= 1
            if not self._storing[key]:
                del self._storing[key]

    def has_pending_work(self) -> bool:
        """Keep the engine stepping until transfers were reported."""
        return bool(self._jobs)

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Chunks were wanted: they are evicted later."""
        self._held.touch(self._key(key) for key in keys)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """No wishes: chunk by chunk."""
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        """Wait until nothing touches the primary tier's memory."""
        for _, move in self._jobs.values():
            if move is not None:
                with contextlib.suppress(Exception):  # `get_finished_jobs` reports it
                    move.wait()

    def shutdown(self) -> None:
        """Finish what is queued, commit, and let go of the directory."""
        self._moves.close()
        self._tier.close()
        self._jobs.clear()
        self._chunks = self._chunks[
            :0
        ].copy()  # vLLM cannot unmap the region while views of it live

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Name what `get_stats` tells."""
        gauges = {_PREFIX + name: OffloadingGaugeMetadata(text) for name, text in _GAUGES.items()}
        counters = {
            _PREFIX + name: OffloadingCounterMetadata(text) for name, text in _COUNTERS.items()
        }
        return gauges | counters

    def counters(self) -> dict[str, float]:
        """What happened since the start."""
        return {**self._tier.counters(), **self._counts}

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What happened since the last call, in vLLM's words; between transfers only."""
        if self._moves.waiting_bytes:
            return None
        now = self.counters()
        if now == self._told:
            return None
        stats = OffloadingConnectorStats()
        for name in _GAUGES:
            stats.set_gauge(_PREFIX + name, now[name])
        for name in _COUNTERS:
            stats.increase_counter(_PREFIX + name, now[name] - self._told.get(name, 0))
        self._told = now
        return stats


def _ended(move: Move | None) -> bool:
    return move is None or move.done


def _offloading_facts(spec: Any) -> list[str]:
    """What of vLLM's offloading decides how a chunk's bytes lie."""
    config = spec.config
    parallel = config.parallel
    return [
        *(str(group) for group in config.groups),
        str(config.model.dtype),
        str(config.kv_cache_layout),
        f"{config.cache} {config.worker_kv_bytes_per_block}",
        f"{config.replicated_layout} {config.canonical_layout}",
        f"{parallel.tp_size} {parallel.pp_size} {parallel.pcp_size} {parallel.dcp_size}",
    ]


class PlaitOffloadingConnector(OffloadingConnector):
    """vLLM's OffloadingConnector, which tells each `PlaitTier` what model it serves."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        if role == KVConnectorRole.SCHEDULER:
            extra = vllm_config.kv_transfer_config.kv_connector_extra_config
            for tier in extra.get("secondary_tiers", []):
                if tier.get("type") == PlaitTier.__name__ and "model" not in tier:
                    digest = model_digest(vllm_config, kv_cache_config, tier.get("weights"))
                    tier["model"] = digest.hex()
        super().__init__(vllm_config, role, kv_cache_config)
