"""Numba's `njit` and `cfunc`, with a cache on disk that many processes may fill at once.

Numba keeps one index for each function: it reads it, adds a line, writes it back, then writes the code to the place
it chose. Two ranks that start cold and compile a function for different types choose the same place: entries are
lost, or one's code is kept under the other's types and gives wrong numbers ever after (docs/decisions/042). Here each
entry has an index of its own, named by the types and the sources it was made from, so there is nothing to
read, change and write back. Ranks that need the same kernel compile it once: the others wait, for a while.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any

import numba
from numba.core import config, sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile, _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher

PATIENCE = 60.0  # seconds to wait for another process's compiler, before compiling as well
IMPORTED = time.time()  # what changes later is not what this process has in memory
_RELATIVE = re.compile(r"^from (\.+)([\w.]*) import", re.MULTILINE)


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when it is first called, as `numba.njit(cache=True)` does."""

    def compiled(function: Callable[..., Any]) -> Any:
        if config.DISABLE_JIT:  # type: ignore[attr-defined]
            return function
        kernel = _Kernel(function, targetoptions={"nopython": True, "boundscheck": None, **options})
        kernel.enable_caching()
        return kernel

    return compiled


def cfunc(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a C function now, as `numba.cfunc(signature, cache=True)` does."""

    def compiled(function: Callable[..., Any]) -> Any:
        callback = _Callback(function, sigutils.normalize_signature(signature), {}, {})
        callback.enable_caching()
        callback.compile()
        return callback

    return compiled


def entry(kernel: Any) -> Callable[..., Any]:
    """Find the C function of a kernel that is compiled for one signature, and whose arguments are plain numbers.

    Past the dispatcher, which looks at the types of all arguments, a call costs 0.1 us less.
    """
    (compiled,) = kernel.overloads.values()
    return compiled.entry_point


def kept_in() -> str | None:
    """Say which folder keeps the CPU kernels of this package; None where none can be written."""
    return KernelCache(njit).cache_path


class KernelCache(_Cache):
    """What one function was compiled to, for each signature.

    State: nothing is read or written before the first compilation. Where no folder can be written, or a source has
    changed since this process imported it, nothing is kept; a full disk or a damaged entry costs a compilation.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    @cached_property
    def _disk(self) -> FunctionCache | None:
        try:
            disk = FunctionCache(self._function)
            stamp, changed = _sources(Path(self._function.__code__.co_filename))
        except (OSError, RuntimeError):  # the latter is Numba's "no locator available"
            return None
        if changed > IMPORTED:
            return None
        disk._cache_file = _Entries(disk.cache_path, disk._impl.filename_base, stamp)
        return disk

    @property
    def cache_path(self) -> str | None:
        return None if self._disk is None else self._disk.cache_path

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Whatever an entry torn by a power cut raises: it is compiled again, and written anew.
        with suppress(Exception):
            return self._disk and self._disk.load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            if self._disk:
                self._disk.save_overload(sig, data)

    def enable(self) -> None:
        """It is always on."""

    disable = flush = enable

    @contextmanager
    def turn(self, sig: Any, target_context: Any) -> Iterator[None]:
        """Keep other processes from compiling this, unless it is there; for `PATIENCE` at most, and where locks work.

        Kernels call each other without circles, so no two processes wait for each other; a lock ends with its process.
        """
        lock = self._lock(sig, target_context)
        try:
            yield
        finally:
            if lock is not None:
                with suppress(OSError):  # who waits finds the entry; who comes now sees it
                    Path(lock.name).unlink()
                # closing is not enough: a child forked meanwhile has the file open as well
                fcntl.flock(lock, fcntl.LOCK_UN)
                lock.close()

    def _lock(self, sig: Any, target_context: Any) -> IO[str] | None:
        if self._disk is None:
            return None
        entries = self._disk._cache_file
        if entries.holds(self._disk._index_key(sig, target_context.codegen())):
            return None
        return _locked(Path(f"{entries._index_path}.lock"))


class _Kernel(CPUDispatcher):
    def enable_caching(self) -> None:
        self._cache = KernelCache(self.py_func)

    def compile(self, sig: Any) -> Any:
        if sig in self.overloads:
            return super().compile(sig)
        # Numba's own lock first, as everywhere: threads of this process must not take them in the other order.
        with global_compiler_lock, self._cache.turn(sig, self.targetctx):
            return super().compile(sig)


class _Callback(CFunc):
    def enable_caching(self) -> None:
        self._cache = KernelCache(self._pyfunc)

    def compile(self) -> None:
        target = self._targetdescr.target_context
        with global_compiler_lock, self._cache.turn(self._sig, target):
            super().compile()


class _Entries(IndexDataCacheFile):
    """An index and a file of code for each entry; no file is ever written with anything else than that entry."""

    def holds(self, key: Any) -> bool:
        one = self._of(key)
        return Path(one._data_path(one._data_name(1))).exists()

    def load(self, key: Any) -> Any:
        return self._of(key).load(key)

    def save(self, key: Any, data: Any) -> None:
        one = self._of(key)
        one.flush()  # Numba reads the index before it writes it, and this one may be torn
        one.save(key, data)
        mine, older = self._name(self._source_stamp), self._name("")
        for path in Path(self._cache_path).glob(f"{older}*.nb[ci]"):
            if not path.name.startswith(mine):
                path.unlink(missing_ok=True)

    def _of(self, key: Any) -> IndexDataCacheFile:
        digest = hashlib.sha256(repr((numba.__version__, key)).encode()).hexdigest()
        name = f"{self._name(self._source_stamp)}{digest[:16]}"
        return IndexDataCacheFile(self._cache_path, name, self._source_stamp)

    def _name(self, stamp: str) -> str:
        return f"{self._index_name.removesuffix('.nbi')}-{stamp[:8]}"


@cache
def _sources(file: Path) -> tuple[str, float]:
    """Digest a file and those it imports by relative names, whose code may stand in its own; and when one last changed.

    Numba's own stamp is of the one file: it would keep a kernel that calls another's older code.
    """
    texts: dict[Path, str] = {}
    waiting, changed = [file], 0.0
    while waiting:
        path = waiting.pop()
        if path in texts or not path.exists():
            continue
        texts[path] = path.read_text()
        changed = max(changed, path.stat().st_ctime)  # mtime is whatever an archive said
        for dots, name in _RELATIVE.findall(texts[path]):
            target = path.parents[len(dots) - 1].joinpath(*name.split("."))
            waiting += [target.with_suffix(".py"), target / "__init__.py"]
    said = repr([(path.name, texts[path]) for path in sorted(texts)])
    return hashlib.sha256(said.encode()).hexdigest(), changed


def _locked(path: Path) -> IO[str] | None:
    """Open and lock a file; None where that cannot be done, or another process has held it for `PATIENCE`."""
    try:
        lock = path.open("w")
    except OSError:
        return None
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as error:
            # BlockingIOError: held; anything else: a file system without locks
            if not isinstance(error, BlockingIOError) or time.monotonic() > until:
                lock.close()
                return None
        time.sleep(0.01)
