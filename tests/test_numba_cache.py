"""A world compiles a kernel once, whichever of its ranks is the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from numba import config, njit
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

from world import run_world


def compiled(folder: str, in_turn: bool) -> int:
    """How often this rank compiled; without turns all look into the cache before any of them writes it."""
    config.CACHE_DIR = folder  # type: ignore[attr-defined]
    if not in_turn:
        load = IndexDataCacheFile.load

        def together(self: Any, key: Any) -> Any:
            found = load(self, key)
            dist.barrier()
            return found

        IndexDataCacheFile.load = together
        Dispatcher.compile = Dispatcher.compile.__wrapped__  # type: ignore[attr-defined]

    @njit(cache=True)
    def kernel(x: float) -> float:
        return x + 1

    dist.barrier()
    assert kernel(2.0) == 3.0
    return sum(kernel.stats.cache_misses.values())


@pytest.mark.parametrize(("in_turn", "times"), [(True, 1), (False, 3)])
def test_a_world_compiles_once(in_turn: bool, times: int, tmp_path: Path) -> None:
    assert sum(run_world(compiled, 3, str(tmp_path), in_turn)) == times
