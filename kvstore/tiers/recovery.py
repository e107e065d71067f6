"""Opening a directory: from its index, or if that is damaged from the slots themselves."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from .catalog import Catalog
from .errors import TierError, TierRefused
from .folder import Folder
from .form import (
    BLOCK,
    HELD,
    OPENED,
    Damaged,
    Geometry,
    Record,
    read_slot,
)
from .index import Index
from .memory import aligned_region, round_up
from .order import EvictionOrder, Lru
from .pages import combined
from .slabs import MAX_SLABS, OURS, Slabs, read_slab_geometry, slab_numbers

SLAB_BYTES = 1 << 30


@dataclass
class Opened:
    """A directory, ready for use.

    Attributes:
        scanned: the index could not be trusted and the slots were asked.
        dropped: pages of the index or the slots that could not be taken over.
    """

    folder: Folder
    index: Index
    slabs: Slabs
    catalog: Catalog
    scanned: bool
    dropped: int

    @property
    def geometry(self) -> Geometry:
        """How the directory is cut."""
        return self.slabs.geometry


def new_geometry(page_bytes: int, max_bytes: int) -> Geometry:
    """Cut a new directory: slabs of at most 1 GiB that together fill `max_bytes`.

    Raises:
        ValueError: if not one page fits.
    """
    slot_bytes = BLOCK + round_up(page_bytes)
    slabs = -(-max_bytes // max(SLAB_BYTES, slot_bytes + BLOCK))
    per_slab = (max_bytes // slabs - BLOCK) // slot_bytes if slabs > 0 else 0
    if page_bytes < 1 or per_slab < 1:
        raise ValueError(
            f"max_bytes={max_bytes} holds no page of {page_bytes} bytes; with its header and its slab's "
            f"one takes {slot_bytes + BLOCK}"
        )
    return Geometry(slot_bytes, per_slab)


def open_to_write(
    folder: Folder, order: EvictionOrder, page_bytes: int | None, max_bytes: int | None
) -> Opened:
    """Lock a directory, recover what it holds, and make it fit to be written.

    Args:
        page_bytes: the largest page there will be; None for what the directory was made for.
        max_bytes: how many slabs there may be; None for as many as there are.

    Raises:
        TierRefused: if the directory is something else's.
        TierLocked: if it has a writer.
        FormatTooNew: if a later version wrote it; nothing is changed.
    """
    strange = [name for name in folder.names() if not OURS.fullmatch(name)]
    if strange:
        raise TierRefused(
            f"{folder.path} holds {strange[0]!r}, which is not a cache's; name another directory"
        )
    folder.lock("lock")
    for name in folder.names():
        if name.endswith(".new"):  # a process died while it made this
            folder.unlink(name)
    folder.sync_names()  # a name whose sync failed is listed, but a power cut would take it
    index = Index(folder)
    with contextlib.ExitStack() as undo:
        undo.callback(index.close)
        index.load(write=True)
        geometry = _geometry(folder, index, page_bytes)
        if geometry is None:
            if page_bytes is None or max_bytes is None:
                raise FileNotFoundError(
                    f"{folder.path} holds no cache; give page_bytes and max_bytes to make one"
                )
            geometry = new_geometry(page_bytes, max_bytes)
        most = len(slab_numbers(folder)) if max_bytes is None else max_bytes // geometry.slab_bytes
        slabs = Slabs(folder, geometry, min(max(most, 1), MAX_SLABS), write=True)
        undo.callback(slabs.close)
        opened = _restore(folder, index, slabs, order)
        catalog = opened.catalog
        if opened.scanned:  # a scan also finds pages that a killed writer had not synced yet
            for number in slabs.numbers:
                slabs.sync(number)
        if not index.whole or opened.dropped or index.is_long(len(catalog.slots)):
            index.rewrite(geometry, catalog.durable())
        else:
            index.append([Record(OPENED, 0, catalog.first_seq)])
        undo.pop_all()
    return opened


def open_to_read(folder: Folder, page_bytes: int | None) -> Opened:
    """Read what a directory holds; changes nothing, and needs no lock.

    Raises:
        FileNotFoundError: if there is no cache.
        TierError: if nothing says how it is cut.
        FormatTooNew: if a later version wrote it.
    """
    index = Index(folder)
    with contextlib.ExitStack() as undo:
        undo.callback(index.close)
        index.load(write=False)
        geometry = _geometry(folder, index, page_bytes)
        if geometry is None and slab_numbers(folder):
            raise TierError(f"{folder.path}: neither its index nor a slab says how it is cut")
        if geometry is None:
            raise FileNotFoundError(f"{folder.path} holds no cache")
        slabs = Slabs(folder, geometry, MAX_SLABS, write=False)
        undo.callback(slabs.close)
        opened = _restore(folder, index, slabs, Lru())
        undo.pop_all()
    return opened


def reread(opened: Opened) -> Opened:
    """Read again what a directory holds, keeping its slabs open."""
    opened.slabs.open_new()
    index = Index(opened.folder)
    try:
        index.load(write=False)
        return _restore(opened.folder, index, opened.slabs, Lru())
    finally:
        index.close()


def _geometry(folder: Folder, index: Index, page_bytes: int | None) -> Geometry | None:
    """Ask the index, then every slab; also the slabs' versions, before anything is written."""
    found = index.geometry
    for number in slab_numbers(folder):
        with contextlib.suppress(Damaged, OSError):
            said = read_slab_geometry(folder, number)
            found = said if found is None else found
    if found is not None and page_bytes is not None and page_bytes > found.page_bytes:
        raise ValueError(
            f"{folder.path} has slots for pages of {found.page_bytes} bytes, not of {page_bytes}; "
            "use another directory"
        )
    return found


def _restore(folder: Folder, index: Index, slabs: Slabs, order: EvictionOrder) -> Opened:
    records, last_seq, scanned = list(index.held.values()), index.last_seq, False
    if not index.whole and slabs.numbers:
        scanned = True
        records = scan(slabs)
        last_seq = max([last_seq, *(record.seq for record in records)])
    catalog = Catalog(order, last_seq)
    for number in slabs.numbers:
        catalog.add_slots(slabs.slots(number))
    dropped = catalog.restore(records, slabs.geometry.page_bytes)
    return Opened(folder, index, slabs, catalog, scanned, dropped)


def scan(slabs: Slabs) -> list[Record]:
    """Read the header of every slot; give the pages that they say are there."""
    found = []
    block = aligned_region(1, BLOCK)[0]
    for number in slabs.numbers:
        for slot in slabs.slots(number):
            with contextlib.suppress(Damaged, OSError):
                if slabs.read(slot, [block]) != BLOCK:
                    continue
                header = read_slot(block.data)
                if header.slot == slot:
                    found.append(Record(HELD, slot, header.seq, header.length, combined(header)))
    return found


def folder_at(path: str | Path | Folder, create: bool) -> Folder:
    """Take a folder as it is, or open the one at a path."""
    return path if isinstance(path, Folder) else Folder(path, create)
