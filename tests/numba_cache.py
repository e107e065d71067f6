"""Numba's cache on disk, with one writer at a time: several processes of a test run fill it when it is cold.

Numba reads the index of a kernel, adds a line, and writes it back. Of two processes that compiled the kernel for
different types at the same moment, one would leave its code under the other's types.
"""

from __future__ import annotations

import fcntl
import functools
from pathlib import Path
from typing import Any

from numba.core.caching import IndexDataCacheFile


def let_one_write() -> None:
    """Take turns from here on in this process and those forked from it; each kernel has its own turn."""
    save = IndexDataCacheFile.save

    @functools.wraps(save)
    def alone(self: Any, key: Any, data: Any) -> None:
        with Path(f"{self._index_path}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            save(self, key, data)

    IndexDataCacheFile.save = alone
