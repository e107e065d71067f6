"""The disk tier against a serving engine's file tier, in that engine's environment: store, cold load, damage.

    .venv-vllm/bin/python benchmarks/kv_disk_peers.py DIR --peer vllm [--page 2MiB] [--bytes 256MiB] [--rounds 7]
    python benchmarks/kv_disk_peers.py DIR --peer sglang ...   where `pip install --no-deps sglang` was done
    python benchmarks/kv_disk_peers.py DIR --peer lmcache ...  and of lmcache, aiofile, caio and sortedcontainers

Interleaved rounds over the same bytes in the same memory, `--threads` each where the peer has any. Raw is one
preallocated file with O_DIRECT, without checksum or sync. plait checksums and syncs; the peers do neither. Files that
a peer left in the page cache are dropped from it before they are timed. Prints GB/s (min / median / max) and the
median of the ratio to the peer in the same round. Then every contender's stored pages are damaged in the same ways,
and it is told whether what is loaded is the page, a miss, or wrong.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from contest import heading
from disk_contenders import PEERS, Contender, Memory, Plait
from kv_disk import Raw, disk_parser

from plait.kvstore.spec import parse_bytes


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
    parser = disk_parser(__doc__)
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
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
