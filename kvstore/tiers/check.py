"""What a person wants to know of a cache directory, and do to it: look, verify, repair, compact, measure."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .disk import DiskTier
from .folder import Folder
from .form import BLOCK, VERSION, Damaged, Record, form_of, read_slot
from .index import NAME
from .memory import aligned_region
from .moves import Moves
from .order import Lru
from .pages import RUN_BYTES, PageIo, Piece
from .recovery import Opened, open_to_read, open_to_write
from .slabs import OURS, slab_name

Progress = Callable[[int, int], None]  # pages done, of how many


@dataclass
class Look:
    """A directory at a glance.

    Attributes:
        forms: per form of pages what it is, how many there are, and their bytes.
        unreadable: held pages whose header is damaged; `verify` says how.
        strange: files that are not a cache's.
    """

    version: int
    slot_bytes: int
    slabs: int
    slots: int
    pages: int
    page_bytes: int
    disk_bytes: int
    index_lines: int
    index_whole: bool
    dropped: int
    unreadable: int = 0
    forms: list[dict[str, Any]] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BadSlot:
    """A held page that is not what was put, and why."""

    slot: int
    file: str
    offset: int
    key: str
    wrong: str


@contextlib.contextmanager
def opened(path: Path, write: bool) -> Iterator[Opened]:
    """A directory without a form: all its pages.

    Raises:
        FileNotFoundError: if it holds no cache.
    """
    folder = Folder(path, create=False)
    try:
        found = open_to_write(folder, Lru(), None, None) if write else open_to_read(folder, None)
        yield found
        found.index.close()
        found.slabs.close()
    finally:
        folder.close_all()


def look(path: Path) -> Look:
    """Read the index and the header of every held slot."""
    with opened(path, write=False) as found:
        folder, geometry, records = found.folder, found.geometry, found.catalog.records()
        seen = Look(
            VERSION, geometry.slot_bytes, len(found.slabs.numbers), found.catalog.num_slots, len(records),
            sum(record.length for record in records), geometry.slab_bytes * len(found.slabs.numbers),
            found.index.lines, found.index.whole, found.dropped,
            strange=[name for name in folder.names() if not OURS.fullmatch(name)],
        )  # fmt: skip
        counts: Counter[bytes] = Counter()
        sizes: Counter[bytes] = Counter()
        said: dict[bytes, dict[str, Any]] = {}
        block = aligned_region(1, BLOCK)[0]
        for record in records:
            try:
                found.slabs.read(record.slot, [block])
                header = read_slot(block.data)
            except (Damaged, OSError):
                seen.unreadable += 1
                continue
            counts[header.form] += 1
            sizes[header.form] += header.length
            said.setdefault(header.form, form_of(header))
        seen.forms = [
            {**said[form], "pages": count, "bytes": sizes[form]}
            for form, count in counts.most_common()
        ]
        return seen


def verify(path: Path, progress: Progress | None = None) -> list[BadSlot]:
    """Read every held page; give those that are not what was put."""
    with opened(path, write=False) as found:
        return [bad for _, bad in _bad(found, progress)]


def repair(path: Path, progress: Progress | None = None) -> tuple[list[BadSlot], bool]:
    """Drop damaged pages, and make the index anew if it was damaged; give both."""
    with opened(path, write=True) as found:
        bad = list(_bad(found, progress))
        for record, _ in bad:
            slot = found.catalog.drop(record.key)
            if slot is not None:
                found.slabs.erase(slot)
        for number in found.slabs.numbers:
            found.slabs.sync(number)
        found.catalog.take_pending()
        found.index.rewrite(found.geometry, found.catalog.durable())
        return [slot for _, slot in bad], found.scanned


def compact(path: Path) -> tuple[int, int, int]:
    """Write the index anew and give back slabs without pages; give its lines before and after, and the slabs."""
    with opened(path, write=True) as found:
        before = found.index.lines
        per_slab = found.geometry.slots_per_slab
        used = {record.slot // per_slab for record in found.catalog.records()}
        empty = [number for number in found.slabs.numbers if number not in used]
        found.index.rewrite(found.geometry, found.catalog.durable())
        for number in empty:
            found.folder.unlink(slab_name(number))
        found.folder.sync_names()
        return before, found.index.lines, len(empty)


def _bad(found: Opened, progress: Progress | None) -> Iterator[tuple[Record, BadSlot]]:
    io = PageIo(found.slabs, 1)
    room = aligned_region(64, found.geometry.page_bytes)
    records = sorted(found.catalog.records(), key=lambda record: record.slot)
    for begin in range(0, len(records), len(room)):
        part = records[begin : begin + len(room)]
        pieces = [Piece(i, record, room[i]) for i, record in enumerate(part)]
        for run in io.runs(pieces):
            io.read(run)
        for piece in pieces:
            if piece.wrong is not None:
                yield piece.record, _describe(found, piece.record, piece.wrong)
        if progress is not None:
            progress(begin + len(part), len(records))


def _describe(found: Opened, record: Record, wrong: str) -> BadSlot:
    number, inside = divmod(record.slot, found.geometry.slots_per_slab)
    offset = BLOCK + inside * found.geometry.slot_bytes
    key = record.key[16:].hex()
    return BadSlot(record.slot, slab_name(number), offset, key, wrong)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of a disk, by a raw loop and by the tier; the best of some rounds."""

    page_bytes: int
    direct: bool
    raw_store: float
    raw_load: float
    tier_store: float
    tier_load: float


def bandwidth(path: Path, page_bytes: int, total_bytes: int, rounds: int = 3) -> Bandwidth:
    """Measure in a temporary directory beside or in `path`, and remove it."""
    place = path.parent if (path / NAME).exists() else path
    count = max(1, total_bytes // page_bytes)
    pages, out = aligned_region(count, page_bytes), aligned_region(count, page_bytes)
    pages[:] = np.random.default_rng(0).integers(0, 256, pages.shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Folder(Path(name) / "raw")
        file = folder.create("raw", direct=True)
        folder.preallocate(file, pages.size)
        room = (count + 1) * (page_bytes + 2 * BLOCK)
        tier = DiskTier(Path(name) / "tier", page_bytes=page_bytes, max_bytes=room)
        with ThreadPoolExecutor(4) as pool, tier, Moves(tier) as moves:
            keys: list[bytes] = []

            run = max(1, RUN_BYTES // page_bytes)

            def raw(call: Callable[..., int], memory: np.ndarray) -> None:
                def some(i: int) -> int:
                    return call(file, [memory[i : i + run]], i * page_bytes)

                list(pool.map(some, range(0, count, run)))

            def store() -> None:
                keys[:] = [os.urandom(16) for _ in range(count)]
                moves.store(keys, list(pages)).wait()

            calls: list[Callable[[], object]] = [
                lambda: raw(folder.write, pages),
                lambda: raw(folder.read, out),
                store,
                lambda: moves.load(keys, list(out)).wait(),
            ]
            best = [
                min(times) for times in zip(*(_timed(calls) for _ in range(rounds)), strict=True)
            ]
        folder.close(file)
        folder.close_all()
    return Bandwidth(page_bytes, tier.folder.direct, *(pages.size / seconds for seconds in best))


def _timed(calls: list[Callable[[], object]]) -> list[float]:
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times
