"""The disk tier against a raw O_DIRECT loop over one preallocated file: store and cold load.

    python benchmarks/kv_disk.py DIR [--page 2MiB] [--bytes 256MiB] [--rounds 7] [--threads 4]

Every contender moves the same bytes with the same number of threads, in interleaved rounds; all reads and writes go
past the page cache, so every load is cold. "raw" has no checksum, no header, no index; "raw, synced" adds one fdatasync
a group; "raw, small" uses ordinary memory, as fio does unless it is told otherwise; all others use the same huge pages,
which plait's own memory is made of. plait checksums every page, syncs slab and index after every group, and overwrites
the pages of the round before. "file per page" writes a temporary file and renames it, unsynced, as the file tiers of
serving engines do. Prints GB/s (min / median / max), the ratios to raw and to "raw, small" in the same round (medians),
and CPU seconds a GB.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading

from plait.kvstore.spec import parse_bytes
from plait.kvstore.tiers import DiskTier
from plait.kvstore.tiers.memory import aligned_region
from plait.kvstore.tiers.moves import Moves

GROUP_BYTES = 32 << 20  # what is synced together
CALL_BYTES = 8 << 20  # of the raw loop: with 2 MiB a call the disk was not full


class Raw:
    """The floor: one file, a thread pool, preadv and pwritev."""

    def __init__(self, folder: Path, pages: np.ndarray, pool: ThreadPoolExecutor) -> None:
        self.pages, self.pool, self.size = pages, pool, pages.shape[1]
        self.group, self.run = (max(1, n // self.size) for n in (GROUP_BYTES, CALL_BYTES))
        self.file = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.file, 0, pages.size)
        self.folder = folder

    def write(self, synced: bool = False, of: np.ndarray | None = None) -> None:
        """Store all pages."""
        source = self.pages if of is None else of
        group = self.group if synced else len(source)
        for begin in range(0, len(source), group):
            stop = min(begin + group, len(source))

            def call(i: int, stop: int = stop) -> int:
                pages = source[i : min(i + self.run, stop)]
                return os.pwritev(self.file, [pages], i * self.size)

            list(self.pool.map(call, range(begin, stop, self.run)))
            if synced:
                os.fdatasync(self.file)

    def read(self, out: np.ndarray) -> None:
        """Load all pages."""

        def call(i: int) -> int:
            return os.preadv(self.file, [out[i : i + self.run]], i * self.size)

        list(self.pool.map(call, range(0, len(out), self.run)))

    def files(self) -> None:
        """Store a file a page, as serving engines do."""

        def one(i: int) -> None:
            path = self.folder / f"page-{i}"
            new = path.with_suffix(".tmp")
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
            os.write(file, self.pages[i])
            os.close(file)
            new.rename(path)

        list(self.pool.map(one, range(len(self.pages))))


def small_pages(like: np.ndarray) -> np.ndarray:
    """Copy into ordinary memory, whatever huge pages the system would give."""
    memory = mmap.mmap(-1, like.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    made = np.frombuffer(memory, np.uint8).reshape(like.shape)
    made[:] = like
    return made


class Ours:
    """The disk tier behind Moves; every round has keys of its own."""

    def __init__(self, folder: Path, pages: np.ndarray, threads: int) -> None:
        self.pages, self.group = pages, max(1, GROUP_BYTES // pages.shape[1])
        room = (len(pages) + 1) * (pages.shape[1] + 4096)
        self.tier = DiskTier(folder / "plait", page_bytes=pages.shape[1], max_bytes=room)
        self.moves = Moves(self.tier, threads)
        self.round = 0

    def keys(self) -> list[bytes]:
        return [b"%d/%d" % (self.round, i) for i in range(len(self.pages))]

    def write(self) -> None:
        """Store all pages, durably."""
        self.round += 1
        keys = self.keys()
        every = range(0, len(keys), self.group)
        moves = [
            self.moves.store(keys[i : i + self.group], self.pages[i : i + self.group])
            for i in every
        ]
        assert all(move.wait() and all(move.held) for move in moves)

    def read(self, out: np.ndarray) -> None:
        """Load all pages, checked."""
        move = self.moves.load(self.keys(), list(out))
        assert move.wait()
        assert all(move.held)


def disk_parser(about: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that moves pages to a directory and back."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", default="2MiB")
    parser.add_argument("--bytes", default="256MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4)
    return parser


def main() -> None:
    args = disk_parser(__doc__).parse_args()
    size = parse_bytes(args.page)
    count = parse_bytes(args.bytes) // size
    pages, out = aligned_region(count, size), aligned_region(count, size)
    pages[:] = np.random.default_rng(0).integers(0, 256, pages.shape, dtype=np.uint8)
    small, small_out = small_pages(pages), small_pages(out)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        with ThreadPoolExecutor(args.threads) as pool:
            raw, ours = Raw(folder, pages, pool), Ours(folder, pages, args.threads)
            calls: dict[str, tuple[Callable[[], None], np.ndarray]] = {
                "store raw": (raw.write, pages),
                "store raw, small": (lambda: raw.write(of=small), pages),
                "store raw, synced": (lambda: raw.write(synced=True), pages),
                "store plait": (ours.write, pages),
                "store file per page": (raw.files, pages),
                "load raw": (lambda: raw.read(out), out),
                "load raw, small": (lambda: raw.read(small_out), small_out),
                "load plait": (lambda: ours.read(out), out),
            }
            print(
                heading("xxhash"), f"; {count} pages of {args.page}, {args.threads} threads", sep=""
            )
            print(f"O_DIRECT {ours.tier.folder.direct}; xxhash {xxhash.VERSION}")
            compare(calls, pages, args.rounds)
            ours.moves.close()
            ours.tier.close()
    finally:
        shutil.rmtree(folder)


def compare(
    calls: dict[str, tuple[Callable[[], None], np.ndarray]], pages: np.ndarray, rounds: int
) -> None:
    """Time the calls in turn, each with the memory that then holds the pages, and print them."""
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(
        rounds + 2
    ):  # two to warm up: the first write of a slab also converts its extents
        for name, (call, out) in calls.items():
            if name.startswith("load"):
                out[:, ::4096] = 0
            begin, busy = time.perf_counter(), time.process_time()
            call()
            took = time.perf_counter() - begin, time.process_time() - busy
            assert np.array_equal(out, pages), f"{name} is wrong"
            if number >= 2:
                clocks[name].append(took)
    report(clocks, pages.size / 1e9)


def report(clocks: dict[str, list[tuple[float, float]]], gb: float) -> None:
    """Print the (wall, CPU) seconds of rounds, against the raw loops of their kind, "store" or "load"."""
    print(
        f"{'':20}{'GB/s min / median / max':>26}{'of raw':>9}{'of raw, small':>15}{'CPU s/GB':>10}"
    )
    for name, took in clocks.items():
        kind, ratios = name.split()[0], []
        for base in (clocks[f"{kind} raw"], clocks[f"{kind} raw, small"]):
            pairs = zip(took, base, strict=True)
            ratios.append(statistics.median(raw / wall for (wall, _), (raw, _) in pairs))
        speeds = sorted(gb / wall for wall, _ in took)
        spread = f"{speeds[0]:.2f} / {statistics.median(speeds):.2f} / {speeds[-1]:.2f}"
        cpu = statistics.median(busy for _, busy in took) / gb
        print(f"{name:20}{spread:>26}{ratios[0]:>9.2f}{ratios[1]:>15.2f}{cpu:>10.2f}")


if __name__ == "__main__":
    main()
