"""The HiCache backend, made by SGLang's factory; the host pool is a stand-in with SGLang's calls."""

# pyright: reportMissingImports=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (2, 4, 64, 32)  # keys and values, layers, tokens, heads * head_dim
KEYS = [f"{i:064x}" for i in range(6)]
pytestmark = pytest.mark.filterwarnings("ignore")  # of SGLang's imports


class HostPool:
    """What a backend asks of SGLang's pool."""

    layout, page_size = "layer_first", 64

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(PAGE, dtype=self.dtype).flatten()


def make(folder: Path, pool: HostPool | None = None, **changes: Any) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    extra = {
        "backend_name": "plait",
        "module_path": "plait.kvstore.engines.sglang_storage",
        "class_name": "PlaitStorage",
        "path": str(folder),
        "max_bytes": "2MiB",
        "model": "toy at 1",
        **changes.pop("extra", {}),
    }
    fields: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "toy",
        **changes,
    }
    config = HiCacheStorageConfig(**fields, extra_config=extra)
    backend = StorageBackendFactory.create_backend("dynamic", config, None)
    if pool is not None:
        backend.register_mem_pool_host(pool)
    return backend


def pages(count: int = len(KEYS)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(PAGE, generator=generator).bfloat16().flatten() for _ in range(count)]


def blank(count: int) -> list[torch.Tensor]:
    return [HostPool().get_dummy_flat_data_page() for _ in range(count)]


def test_pages_come_back_also_after_a_restart(tmp_path: Path) -> None:
    stored = pages()
    backend = make(tmp_path / "a", HostPool())
    assert backend.batch_exists(KEYS) == 0
    assert backend.batch_set(KEYS[:4], stored[:4])
    assert backend.set(KEYS[5], stored[5])
    assert backend.batch_exists(KEYS) == 4
    assert backend.exists(KEYS[5])
    backend.close()
    backend = make(tmp_path / "a", HostPool())
    assert backend.batch_exists(KEYS) == 4
    given = backend.batch_get(KEYS, blank(6))
    assert [page is not None for page in given] == [True] * 4 + [False, True]
    assert all(torch.equal(a, b) for a, b in zip(given, stored, strict=True) if a is not None)
    assert torch.equal(backend.get(KEYS[0], blank(1)[0]), stored[0])
    backend.close()


def test_a_damaged_page_is_a_miss(tmp_path: Path) -> None:
    stored = pages(2)
    with_noise = make(tmp_path / "a", HostPool())
    assert with_noise.batch_set(KEYS[:2], stored)
    with_noise.close()
    (slab,) = tmp_path.rglob("slab-00000")
    at = slab.read_bytes().find(stored[1].view(torch.uint8).numpy().tobytes())
    with slab.open("r+b") as file:
        file.seek(at + 500)
        byte = file.read(1)[0]
        file.seek(at + 500)
        file.write(bytes([byte ^ 32]))
    backend = make(tmp_path / "a", HostPool())
    given = backend.batch_get(KEYS[:2], blank(2))
    assert torch.equal(given[0], stored[0])
    assert given[1] is None
    assert backend.counters()["damaged"] == backend.counters()["misses"] == 1
    assert backend.batch_exists(KEYS[:2]) == 1
    backend.close()


OTHERS = {
    "weights": {"extra": {"model": "toy at 2"}},
    "secret": {"extra": {"secret": "ab" * 16}},
    "name": {"model_name": "other"},
    "layout": {"is_page_first_layout": True},
    "shard": {"tp_size": 2},
}


@pytest.mark.parametrize("what", OTHERS)
def test_pages_of_others_are_misses(what: str, tmp_path: Path) -> None:
    backend = make(tmp_path / "a", HostPool())
    assert backend.batch_set(KEYS[:1], pages(1))
    backend.close()
    other = make(tmp_path / "a", HostPool(), **OTHERS[what])
    assert other.batch_exists(KEYS[:1]) == 0
    assert other.get(KEYS[0], blank(1)[0]) is None
    other.close()
    pool = make(tmp_path / "a", HostPool(torch.float16))
    assert pool.batch_exists(KEYS[:1]) == 0, "another dtype of the same size"
    pool.close()


def test_the_directory_is_bounded(tmp_path: Path) -> None:
    backend = make(tmp_path / "a", HostPool())
    many = [f"{i:064x}" for i in range(200)]
    page = pages(1)[0]
    for key in many:
        assert backend.set(key, page)
    assert backend.counters()["evicted"] > 0
    assert backend.exists(many[-1])
    assert not backend.exists(many[0])
    backend.close()
    assert sum(path.stat().st_size for path in tmp_path.rglob("slab-*")) <= 2 << 20


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": None}, "needs .*model"),
        ({"interface_v1": 1}, "zero-copy"),
        ({"secret": "ab"}, "16 to 64 random bytes"),
    ],
)
def test_what_is_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "a", HostPool(), extra=extra)


def test_pages_before_the_pool_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="registers its host pool"):
        make(tmp_path / "a").exists(KEYS[0])
