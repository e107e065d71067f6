"""SGLang's HiCache over the disk tier: a storage backend (L3) loaded by module path.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "plait", "class_name": "PlaitStorage",
      "module_path": "plait.kvstore.engines.sglang_storage",
      "path": "/var/cache/kv/my-model", "max_bytes": "200GiB", "model": "my-model at revision 3f2a"}'

SGLang tells a backend the model's name, and neither weights nor RoPE settings: so `model` must say them.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..tiers import DiskTier, PageForm
from .vllm_model import DEFAULT_SECRET, PageKeys, fingerprint

TESTED = "0.5"


def require_sglang() -> str:
    """Give the installed version of SGLang.

    Raises:
        ImportError: if it is missing, or not of the tested line.
    """
    try:
        found = version("sglang")
    except PackageNotFoundError as error:
        raise ImportError(f"PlaitStorage needs SGLang {TESTED}: pip install sglang") from error
    if not found.startswith(f"{TESTED}."):
        raise ImportError(f"PlaitStorage was tested with SGLang {TESTED}.23, this is {found}")
    return found


require_sglang()

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage  # noqa: E402

logger = logging.getLogger(__name__)
_OURS = {"backend_name", "module_path", "class_name", "path", "max_bytes", "model", "secret"}
_NOT_BYTES = {"extra_config", "enable_storage_metrics"}  # of SGLang's configuration


class PlaitStorage(HiCacheStorage):
    """Pages of SGLang's host pool on disk: checked when read, durable when stored, of bounded size.

    A damaged page is a miss; SGLang computes from there on. Models with several pools (sliding windows, states) use
    interfaces that are not here, and SGLang refuses them with this backend.

    Args:
        storage_config: SGLang's; its extra_config has ours.

    State: SGLang calls it from its transfer threads; the tier is thread-safe, and each call does its whole batch.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        extra = dict(storage_config.extra_config or {})
        missing = {name for name in ("path", "max_bytes", "model") if not extra.get(name)}
        if missing:
            raise ValueError(
                f"PlaitStorage needs {sorted(missing)} in the extra config; model is a text that changes with weights "
                "and settings, or it would give pages of others"
            )
        if extra.get("interface_v1"):
            raise ValueError("PlaitStorage has no zero-copy interface; leave interface_v1 out")
        self._extra, self._config = extra, storage_config
        self._tier: DiskTier | None = None
        self._keys = PageKeys(b"")
        self._hits = self._misses = 0

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the directory for this pool's pages."""
        super().register_mem_pool_host(mem_pool_host)
        page = mem_pool_host.get_dummy_flat_data_page()
        config = {k: v for k, v in asdict(self._config).items() if k not in _NOT_BYTES}
        options = {k: v for k, v in self._extra.items() if k not in _OURS}
        facts = [self._extra["model"], require_sglang(), config, options]
        pool = [str(page.dtype), page.numel(), mem_pool_host.page_size, str(mem_pool_host.layout)]
        model = fingerprint([facts, pool])
        secret = self._extra.get("secret")
        self._keys = PageKeys(model, bytes.fromhex(secret) if secret else DEFAULT_SECRET)
        form = PageForm(identity=model.hex(), shape=(page.nbytes,))
        ranks = f"tp{self._config.tp_rank}-pp{self._config.pp_rank}-dp{self._config.dp_rank}"
        folder = Path(self._extra["path"]) / ranks
        self.close()
        self._tier = DiskTier(folder, form, page.nbytes, self._extra["max_bytes"])

    def _opened(self) -> DiskTier:
        if self._tier is None:
            raise ValueError("SGLang registers its host pool before the first page")
        return self._tier

    def _made(self, keys: Sequence[str]) -> list[bytes]:
        return [self._keys.make(key.encode(), 0) for key in keys]

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """Read a page into SGLang's tensor, or say None."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Read pages into SGLang's tensors; None for each that is missing or damaged."""
        found = self._opened().get(self._made(keys), list(target_locations))
        given = [
            length == page.nbytes for length, page in zip(found, target_locations, strict=True)
        ]
        self._hits += sum(given)
        self._misses += len(given) - sum(given)
        return [page if good else None for page, good in zip(target_locations, given, strict=True)]

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Keep a page, durably; say whether it is held."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Keep pages, durably; say whether all are held."""
        tier = self._opened()
        held = tier.put(self._made(keys), [value.contiguous() for value in values])
        try:
            tier.commit()
        except OSError:
            logger.exception("plait: pages could not be made durable")
            return False
        return all(held)

    def exists(self, key: str) -> bool:
        """Say whether a page is held; it may still be found damaged."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Say how many pages from the first on are held."""
        held = self._opened().contains(self._made(keys))
        return held.index(False) if False in held else len(held)

    def counters(self) -> dict[str, float]:
        """What happened since the start."""
        return {**self._opened().counters(), "hits": self._hits, "misses": self._misses}

    def close(self) -> None:
        """Commit, and let go of the directory."""
        if self._tier is not None:
            self._tier.close()
            self._tier = None
