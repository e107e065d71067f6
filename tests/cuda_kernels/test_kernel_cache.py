"""Kernels on disk: compiled once, no code under another's types or of older sources; and no disk needed."""

from __future__ import annotations

import errno
import fcntl
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch.distributed as dist
from numba import config
from numba.core.caching import IndexDataCacheFile

from plait.cuda_kernels import kernel_cache
from plait.cuda_kernels.kernel_cache import _Entries, cfunc, njit
from plait.parallel import doctor
from world import run_world


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.rglob(f"*{kind}"))


def fresh() -> Any:
    """The same kernel again, as another process has it: nothing compiled yet."""

    @njit(nogil=True)
    def kernel(x: float) -> float:
        return x + 1

    return kernel


def compiled(kernel: Any) -> int:
    return sum(kernel.stats.cache_misses.values())


def in_a_world(folder: str, locks: bool) -> int:
    """How often this rank compiled; all look into the cache before any of them writes it."""
    config.CACHE_DIR = folder  # type: ignore[attr-defined]
    if not locks:
        kernel_cache._locked = lambda path: None
    holds = _Entries.holds

    def together(self: Any, key: Any) -> bool:
        found = holds(self, key)
        dist.barrier()
        return found

    _Entries.holds = together
    if not locks:
        load = _Entries.load

        def loaded(self: Any, key: Any) -> Any:
            found = load(self, key)
            dist.barrier()
            return found

        _Entries.load = loaded
    kernel = fresh()
    assert kernel(2.0) == 3.0
    return compiled(kernel)


@pytest.mark.parametrize(("locks", "times"), [(True, 1), (False, 3)])
def test_a_world_compiles_once(locks: bool, times: int, folder: Path) -> None:
    assert sum(run_world(in_a_world, 3, str(folder), locks)) == times
    assert not files(folder, ".lock")


@pytest.mark.parametrize(("entries", "found"), [(_Entries, "b"), (IndexDataCacheFile, "a")])
def test_two_that_write_at_once_keep_their_own(
    entries: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have read the index before either writes it, and the first is the last to write its code."""
    ours = entries(str(tmp_path), "kernel-1.py311", "stamp")
    save = IndexDataCacheFile._save_data

    def late(self: Any, name: str, data: str) -> None:
        if data == "a":
            ours.save("float32", "b")
        save(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(IndexDataCacheFile, "_load_index", lambda self: {})
        patched.setattr(IndexDataCacheFile, "_save_data", late)
        ours.save("int32", "a")
    assert ours.load("float32") == found


def test_doctor_says_where_kernels_are_kept(folder: Path) -> None:
    found = doctor._cpu_kernels()
    assert found.state == "ok"
    assert str(folder) in found.value


def test_a_callback_is_kept_too(folder: Path) -> None:
    def doubled() -> Any:
        @cfunc("float64(float64)")
        def double(x: float) -> float:
            return 2 * x

        return double

    first, second = doubled(), doubled()
    assert (first.cache_hits, second.cache_hits) == (0, 1)
    assert second.ctypes(4.0) == 8.0
    assert len(files(folder, ".nbc")) == 1


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Callable[[str, float], Any]]:
    """Write and import two modules, of which one calls the other's kernel."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    sys.path.insert(0, str(tmp_path))

    def written(decorator: str, constant: float) -> Any:
        below = f"{decorator}\ndef add(x): return x + {constant}\n"
        above = f"{decorator}\nfrom .below import add\n@njit()\ndef kernel(x): return add(x)\n"
        (tmp_path / "kernels/below.py").write_text(below.replace("\ndef", "\n@njit()\ndef"))
        (tmp_path / "kernels/above.py").write_text(above)
        for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        kernel_cache._sources.cache_clear()
        return importlib.import_module("kernels.above").kernel

    yield written
    sys.path.remove(str(tmp_path))


NUMBAS = "import functools, numba\nnjit = functools.partial(numba.njit, cache=True)"
OURS = "from plait.cuda_kernels.kernel_cache import njit"


@pytest.mark.parametrize(("decorator", "second"), [(OURS, 200.0), (NUMBAS, 10.0)])
def test_code_is_of_todays_sources(
    decorator: str, second: float, package: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba's own cache looks at a kernel's file, not at those it calls."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(kernel_cache, "IMPORTED", float("inf"))
    assert package(decorator, 10.0)(0.0) == 10.0
    assert package(decorator, 200.0)(0.0) == second
    if decorator is OURS:
        again = package(decorator, 200.0)
        assert (again(0.0), compiled(again)) == (200.0, 0)
        assert len(files(folder, ".nbi")) == 2  # those of the older sources are gone


def test_nothing_is_kept_of_sources_that_changed_since(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has the older ones in memory; the next would take their code for the newer ones'."""
    monkeypatch.setattr(kernel_cache, "IMPORTED", 0.0)
    assert fresh()(2.0) == 3.0
    assert not files(folder, ".nbi")


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
def test_a_torn_entry_is_written_anew(kind: str, folder: Path) -> None:
    fresh()(2.0)
    (torn,) = files(folder, kind)
    torn.write_bytes(b"")
    kernel, after = fresh(), fresh()
    assert (kernel(2.0), compiled(kernel)) == (3.0, 1)
    assert (after(2.0), compiled(after)) == (3.0, 0)


def test_a_full_disk_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    assert fresh()(2.0) == 3.0


def test_no_folder_that_can_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("numba.core.caching.tempfile.TemporaryFile", read_only)
    with pytest.raises(
        RuntimeError, match="no locator available"
    ):  # at import, so that plait could not be
        numba.njit(cache=True)(lambda x: x)
    kernel = fresh()
    assert kernel(2.0) == 3.0
    assert kernel.stats.cache_path is None
    assert doctor._cpu_kernels().state == "absent"


def held(folder: Path) -> Any:
    """What a process that compiles the kernel for another type, and is stopped meanwhile, has locked."""
    fresh()(2.0)
    index, code = (files(folder, kind)[0] for kind in (".nbi", ".nbc"))
    lock = (index.parent / f"{index.name.rsplit('-', 1)[0]}.nbi.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    index.unlink()
    code.unlink()
    return lock


def test_a_stuck_compiler_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []
    monkeypatch.setattr(kernel_cache.time, "sleep", slept.append)
    monkeypatch.setattr(kernel_cache, "PATIENCE", 0.05)
    with held(folder):
        assert fresh()(2.0) == 3.0
    assert slept


def test_a_file_system_without_locks_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refused(*args: Any) -> None:
        asked.append(args)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(kernel_cache.fcntl, "flock", refused)
    assert fresh()(2.0) == 3.0
    assert len(asked) == 1
    assert len(files(folder, ".nbc")) == 1
