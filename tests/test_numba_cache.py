"""Two processes that fill Numba's cache at the same moment both find their own code in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import IndexDataCacheFile


@pytest.mark.parametrize(("locked", "timeout", "kept"), [(True, 0.2, True), (False, 30, False)])
def test_two_writers(
    locked: bool, timeout: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock both read the index before either writes it: one entry is lost."""
    read, both = IndexDataCacheFile._load_index, threading.Barrier(2)

    def meet(self: Any) -> dict[Any, Any]:
        found = read(self)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout)
        return found

    save: Callable[..., None] = IndexDataCacheFile.save
    save = save if locked else save.__wrapped__  # type: ignore[attr-defined]
    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(IndexDataCacheFile, "_load_index", meet)
        files = [IndexDataCacheFile(str(tmp_path), "kernel", 1) for _ in range(2)]
        for each in [pool.submit(save, file, key, key) for key, file in enumerate(files)]:
            each.result()
    found = [IndexDataCacheFile(str(tmp_path), "kernel", 1).load(key) for key in range(2)]
    assert (found == [0, 1]) == kept
