"""Kill a process that writes a disk tier, again and again, and look at what is left.

    python tests/kvstore/faults.py --kills 500 [--seed 0] [--folder DIR] [--json]

A child puts, removes and commits pages from two threads and says so through a pipe; it is killed (SIGKILL) a random
time after it opened or after one of its commits, however fast the machine is. Then bits of the files are flipped, at
times. The parent opens the directory and reads every page it may hold. Exits with 1 if a wrong byte was served, a
committed page lost, or a slot or file leaked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from plait.kvstore.tiers import DiskTier, Lru
from plait.kvstore.tiers.form import BLOCK, FORM_DIGEST_BYTES

PAGE = 12000
SLOT = BLOCK + 12288
SLOTS = 40
SIZE = BLOCK + SLOTS * SLOT
EXPECTED = {"lock", "index", "slab-00000"}
LONGEST = 300  # seconds that a child may take to make its promises


def page_of(key: bytes) -> bytes:
    """The page of a key: the same in child and parent."""
    length = 1 + int.from_bytes(hashlib.sha256(key).digest()[:4], "little") % PAGE
    return hashlib.shake_128(key).digest(length)


class Told(Lru):
    """Says which page it gives up before it is given up."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self._pipe = pipe

    def victim(self) -> bytes | None:
        victim = super().victim()
        if victim is not None:
            say(self._pipe, "gone", [victim[FORM_DIGEST_BYTES:]])
        return victim


def say(pipe: int, what: str, keys: list[bytes]) -> None:
    """Write one line, whole."""
    os.write(pipe, f"{what} {' '.join(key.decode() for key in keys)}\n".encode())


def child(folder: Path, number: int, pipe: int) -> None:
    """Write until killed."""
    tier = DiskTier(folder, page_bytes=PAGE, max_bytes=SIZE, evict=Told(pipe))

    def work(thread: int) -> None:
        draw = random.Random(f"{number}/{thread}")
        mine: list[bytes] = []
        for turn in range(10**9):
            keys = [f"{number}.{thread}.{turn}.{i}".encode() for i in range(draw.randint(1, 4))]
            say(pipe, "put", keys)
            tier.put(keys, [page_of(key) for key in keys])
            mine += keys
            if draw.random() < 0.2:
                gone = draw.sample(mine, min(2, len(mine)))
                say(pipe, "gone", gone)
                tier.remove(gone)
            if draw.random() < 0.5:
                tier.commit()
                held = tier.contains(mine)
                mine = [key for key, yes in zip(mine, held, strict=True) if yes]
                say(pipe, "committed", mine[-40:])

    say(pipe, "open", [])
    threading.Thread(target=work, args=(0,), daemon=True).start()
    work(1)


def death(draw: random.Random, promises: tuple[int, ...], seconds: float) -> tuple[int, float]:
    """Draw when a child dies: after so many promises (-1: when it starts), and so many seconds."""
    return draw.choice(promises), draw.random() * seconds


def killed_child(
    folder: Path,
    number: int,
    when: tuple[int, float],
    promise: bytes,
    child: Callable[[Path, int, int], None] = child,
) -> list[tuple[str, list[bytes]]]:
    """Run a child until its death; give what it said.

    Args:
        when: see `death`; 0 promises: counted from the time it opened.
        promise: the first word of a line that promises something.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            child(folder, number, writer)
        finally:
            os._exit(1)
    os.close(writer)
    said, dead = b"", False
    promises, seconds = when
    waits = promises >= 0
    end = time.monotonic() + (LONGEST if waits else seconds)
    while True:
        if not dead and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            dead = True
        ready, _, _ = select.select([reader], [], [], 5 if dead else max(0, end - time.monotonic()))
        if ready:
            data = os.read(reader, 1 << 16)
            if not data:
                break
            said += data
            if waits and said.count(b"\n" + promise) >= promises:
                waits, end = False, time.monotonic() + seconds
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"the child ended by itself: {status}; it said {said[-200:]!r}")
    if waits:
        raise RuntimeError(f"the child did not keep up in {LONGEST} s; it said {said[-200:]!r}")
    lines = [line.split() for line in said.split(b"\n")[:-1]]  # the last may be half a line
    return [(line[0].decode(), line[1:]) for line in lines]


class Harness:
    """The parent: what must be there, what may be, and the counts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.may: set[bytes] = (
            set()
        )  # never used twice; a scan may find pages that no commit promised
        self.must: set[bytes] = set()
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("kills", "bits flipped", "pages read", "wrong bytes served",
                           "committed pages lost", "slots or files leaked", "scans"), 0)
        )  # fmt: skip

    def kill(self, number: int) -> None:
        """One life of the directory."""
        when, harm = death(self.draw, (-1, 0, 2, 8, 20), 0.03), self.draw.random() < 0.3
        gone: set[bytes] = set()
        for what, keys in killed_child(self.folder, number, when, b"committed"):
            if what == "put":
                self.may |= set(keys)
            elif what == "committed":
                self.must |= set(keys)
            elif what == "gone":
                gone |= set(keys)
        self.must -= gone
        self.counts["kills"] += 1
        if harm and (self.folder / "index").exists():
            self.flip()
        self.look()

    def flip(self) -> None:
        """Turn over a bit somewhere; a page that lies there may be a miss from now on."""
        name = self.draw.choice(("index", "slab-00000"))
        path = self.folder / name
        if not path.exists():
            return
        with path.open("r+b") as file:
            size = min(path.stat().st_size, BLOCK + 128 * 400 if name == "index" else SIZE)
            at = self.draw.randrange(size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << self.draw.randrange(8)]))
        if name != "index":
            with DiskTier(self.folder, mode="read") as tier:
                slot = (at - BLOCK) // SLOT
                for record in tier._opened.catalog.records():
                    if record.slot == slot:
                        self.must.discard(record.key[FORM_DIGEST_BYTES:])
        self.counts["bits flipped"] += 1

    def look(self) -> None:
        """Open, read everything, and compare."""
        with DiskTier(self.folder, page_bytes=PAGE, max_bytes=SIZE) as tier:
            counters = tier.counters()
            self.counts["scans"] += int(counters["recovered_by_scan"])
            keys = sorted(
                key
                for key, held in zip(self.may, tier.contains(list(self.may)), strict=True)
                if held
            )
            out = [np.zeros(PAGE, np.uint8) for _ in keys]
            found = tier.get(keys, out)
            right = set()
            for key, buffer, length in zip(keys, out, found, strict=True):
                self.counts["pages read"] += 1
                if length is not None and buffer[:length].tobytes() != page_of(key):
                    self.counts["wrong bytes served"] += 1
                elif length is not None:
                    right.add(key)
            self.counts["committed pages lost"] += len(self.must - right)
            self.must &= right
            strange = {path.name for path in self.folder.iterdir()} - EXPECTED
            tier.check_integrity()
            catalog = tier._opened.catalog
            leaked = catalog.num_slots - len(catalog.slots) - catalog.num_free
            unknown = len(catalog.slots) - len(right)
            self.counts["slots or files leaked"] += len(strange) + leaked + unknown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where to put the directory (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        harness = Harness(Path(folder) / "cache", options.seed)
        for number in range(options.kills):
            harness.kill(number)
    counts = dict(harness.counts)
    print(
        json.dumps(counts)
        if options.json
        else "\n".join(f"{n:24}{v:>10}" for n, v in counts.items())
    )
    bad = (
        counts["wrong bytes served"],
        counts["committed pages lost"],
        counts["slots or files leaked"],
    )
    sys.exit(1 if any(bad) else 0)


if __name__ == "__main__":
    main()
