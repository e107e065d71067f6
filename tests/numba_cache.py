"""Compile a kernel in one process while the others wait for it, where a cold run would compile it in each of them.

Ranks of a world, and the processes that share a run of the tests, call the same kernel for the first time at the same
time. It also keeps Numba's cache right: Numba reads the index of a kernel, adds a line, and writes it back, and two
processes that do so at once for different types can leave one's code under the other's name.
"""

from __future__ import annotations

import fcntl
import functools
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher


def compile_once() -> None:
    """Take turns at each cached kernel from here on, in this process and those forked from it.

    Kernels call each other without circles, so no two processes wait for each other; a lock ends with its process.
    """
    compiles = Dispatcher.compile

    @functools.wraps(compiles)
    def in_turn(self: Any, sig: Any) -> Any:
        file = getattr(self._cache, "_cache_file", None)
        if file is None or sig in self.overloads:
            return compiles(self, sig)
        # Numba's own lock first, as everywhere: threads of this process must not take them in the other order.
        with global_compiler_lock, Path(f"{file._index_path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return compiles(self, sig)

    Dispatcher.compile = in_turn
