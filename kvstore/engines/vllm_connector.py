"""vLLM with a persistent prefix cache: a KV connector over the disk tier.

    --kv-transfer-config '{"kv_connector": "PlaitConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "plait.kvstore.engines.vllm_connector", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"path": "/var/cache/kv", "max_bytes": "200GiB"}}'

Each worker keeps a directory of its own, of its shard's pages; the scheduler keeps an index of what all of
them hold. Loads are asynchronous: a request waits for its pages while others run. docs/vllm.md is the user's page.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..spec import parse_bytes
from .vllm_model import DEFAULT_SECRET, PageKeys, machine_facts, model_digest, refuse
from .vllm_pages import FirstReport, Plan, Report, group_pages, page_groups
from .vllm_scheduler import PageScheduler
from .vllm_worker import PageWorker

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # isort: skip
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats  # isort: skip
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # isort: skip

OPTIONS = {"path", "max_bytes", "weights", "secret", "staging_bytes", "threads"}


class PlaitStats(KVConnectorStats):
    """Counts since the last one; vLLM logs their sums."""

    def reset(self) -> None:
        """Start anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> PlaitStats:
        """Add another's."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Give the sums."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())


class _Since:
    """Turns counters that only grow into what was added since the last look."""

    def __init__(self) -> None:
        self._told: Mapping[str, float] = {}

    def added(self, now: Mapping[str, float]) -> PlaitStats | None:
        changed = {k: v - self._told.get(k, 0) for k, v in now.items() if v != self._told.get(k, 0)}
        self._told = dict(now)
        return PlaitStats(changed) if changed else None


class PlaitConnector(KVConnectorBase_V1, SupportsHMA):
    """Finds prefixes on disk, across restarts; what is damaged is computed again.

    Extra config:
        path: directory of the cache; one engine writes it. Workers have directories below it.
        max_bytes: what each worker's directory may take.
        weights: what names the weights; default: a commit or digest, see `weights_digest`.
        secret: 32 to 128 hex digits that no tenant knows.
        staging_bytes: host memory per worker for transfers, default 256MiB.
        threads: transfers at a time per worker, default 4.

    Raises:
        ValueError: for settings or models whose pages cannot be kept safely, saying which.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._extra = dict(self._kv_transfer_config.kv_connector_extra_config)
        self._check(vllm_config)
        self._scheduler: PageScheduler | None = None
        self._worker: PageWorker | None = None
        self._since = _Since()
        ranks = vllm_config.parallel_config.world_size
        groups = page_groups(
            kv_cache_config, kv_cache_config.hash_block_size or _tokens(kv_cache_config)
        )
        if role == KVConnectorRole.SCHEDULER:
            model = model_digest(vllm_config, kv_cache_config, self._extra.get("weights"))
            secret = self._extra.get("secret")
            keys = PageKeys(model, bytes.fromhex(secret) if secret else DEFAULT_SECRET)
            self._scheduler = PageScheduler(groups, keys, model, ranks)

    def _check(self, vllm_config: Any) -> None:
        unknown = self._extra.keys() - OPTIONS
        if unknown or "path" not in self._extra or "max_bytes" not in self._extra:
            raise ValueError(
                "PlaitConnector needs path and max_bytes in kv_connector_extra_config, and knows "
                f"{sorted(OPTIONS)}; got {sorted(self._extra)}"
            )
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            raise ValueError(
                "a damaged or evicted page is a miss, so PlaitConnector needs "
                '"kv_load_failure_policy": "recompute" in the kv-transfer-config; with vLLM\'s default, "fail", '
                "it would end the request"
            )
        refuse(vllm_config)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Sleeping moves the caches we have views of: not supported."""
        return False

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not saved is computed again."""
        return False

    # -- worker ------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the directory for these caches."""
        parallel = self._vllm_config.parallel_config
        name = f"engine-{parallel.data_parallel_index}-rank-{parallel.rank}"
        facts = [
            *machine_facts(self._vllm_config),
            f"rank {parallel.rank} tp {parallel.tensor_parallel_size} pp {parallel.pipeline_parallel_size}",
        ]
        self._worker = PageWorker(
            Path(self._extra["path"]) / name,
            self._extra["max_bytes"],
            group_pages(self._kv_cache_config, kv_caches),
            facts,
            parallel.rank,
            parse_bytes(self._extra.get("staging_bytes", "256MiB")),
            int(self._extra.get("threads", 4)),
        )

    def get_handshake_metadata(self) -> FirstReport | None:
        """What the directory holds, for the scheduler."""
        return None if self._worker is None else self._worker.first_report()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin this step's loads; nothing in this step depends on them."""
        self._at_work().begin_loads(self._planned())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is not scheduled before its pages are there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing yet: pages hold all layers of a group."""

    def wait_for_save(self) -> None:
        """Copy the blocks that this step filled, so that vLLM may reuse them."""
        self._at_work().save(self._planned())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Say which requests' loads ended, and which failed."""
        ended, failed = self._at_work().finish()
        several = len(self._kv_cache_config.kv_cache_groups) > 1
        return KVConnectorTransferResults(
            finished_recving=ended, failed_recving=failed if several else set()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Say which blocks were not filled: vLLM computes from the first of them on.

        With several groups block ids are ambiguous to vLLM; then `failed_recving` has the whole request computed.
        """
        failed = self._at_work().failed_blocks()
        return failed if len(self._kv_cache_config.kv_cache_groups) == 1 else set()

    def build_connector_worker_meta(self) -> Report | None:
        """Report what is held now, and no more."""
        return self._at_work().report()

    def _planned(self) -> Plan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan)
        return plan

    def _at_work(self) -> PageWorker:
        assert self._worker is not None, "vLLM registers the caches before the first step"
        return self._worker

    # -- scheduler ---------------------------------------------------------------------------

    def _plans(self) -> PageScheduler:
        assert self._scheduler is not None, "only the scheduler's connector is asked this"
        return self._scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, Any]) -> None:
        """Take in what the workers found in their directories."""
        for first in metadata.values():
            self._plans().index.add(first.rank, first.keys)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Say how many more tokens of a request are on disk."""
        return self._plans().match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load into the blocks that were allocated."""
        self._plans().allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Plan:
        """Give the workers this step's plan."""
        assert self._kv_cache_manager is not None
        return self._plans().plan(scheduler_output, self._kv_cache_manager.get_block_ids)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in the workers' report."""
        if connector_output.kv_connector_worker_meta is not None:
            self._plans().told(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Forget a request; its blocks may go at once."""
        self._plans().finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        """The same, with several groups."""
        return self.request_finished(request, [])

    def has_pending_push_work(self) -> bool:
        """Keep stepping until pages on their way to disk were reported."""
        return self._plans().index.num_saving > 0

    def reset_cache(self) -> bool:
        """Give no page kept so far again: the weights may have changed."""
        self._plans().forget_weights()
        return True

    # -- both --------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PlaitStats | None:
        """What happened since the last call."""
        side = self._worker or self._scheduler
        return None if side is None else self._since.added(side.counts)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PlaitStats:
        """Make stats of what was sent."""
        return PlaitStats(data or {})

    def shutdown(self) -> None:
        """Finish what is queued, and let go of the directory."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _tokens(kv_cache_config: Any) -> int:
    return min(group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups)
