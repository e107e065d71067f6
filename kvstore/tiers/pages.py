"""Pages on their way to and from slots: neighbours in one call, every byte checked."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .form import (
    BLOCK,
    FORM_DIGEST_BYTES,
    Damaged,
    Record,
    SlotHeader,
    pack_slot,
    page_checksum,
    read_slot,
)
from .memory import ALIGNMENT, round_up
from .slabs import Slabs, Staging

# neighbours are moved together up to about this size: disks like few and long calls
RUN_BYTES = 8 << 20
RUN_PAGES = 64


@dataclass(eq=False)
class Piece:
    """One page of a batch: where it is on disk, and the caller's memory for it.

    Attributes:
        index: its place in the caller's batch.
        wrong: why it did not get there, or None.
    """

    index: int
    record: Record
    view: np.ndarray
    wrong: str | None = None


class PageIo:
    """Writes and reads batches of pages through a few staging buffers.

    A page whose memory is aligned and fills its slot is moved in place; others are copied through staging.

    State: thread-safe; at most `staging` transfers at a time, the others wait.
    """

    def __init__(self, slabs: Slabs, staging: int) -> None:
        self._slabs = slabs
        self._slot_bytes = slabs.geometry.slot_bytes
        self._page_bytes = slabs.geometry.page_bytes
        self._run_pages = min(RUN_PAGES, -(-RUN_BYTES // self._slot_bytes))
        self._staging = Staging(staging, self._run_pages * self._slot_bytes)

    def runs(self, pieces: list[Piece]) -> Iterator[list[Piece]]:
        """Cut a batch into runs of neighbours; only a page that fills its slot has one behind it."""
        run: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: piece.record.slot):
            if run and not self._follows(run[-1].record, piece.record, len(run)):
                yield run
                run = []
            run.append(piece)
        if run:
            yield run

    def _follows(self, last: Record, next_: Record, length: int) -> bool:
        return (
            length < self._run_pages
            and next_.slot == last.slot + 1
            and next_.slot % self._slabs.geometry.slots_per_slab != 0
            and round_up(last.length) == self._page_bytes
        )

    def _in_place(self, view: np.ndarray, length: int) -> bool:
        aligned = view.ctypes.data % ALIGNMENT == 0 or not self._slabs.folder.direct
        return aligned and length % ALIGNMENT == 0

    def write(self, run: list[Piece], form: bytes) -> None:
        """Write one run with its headers; each piece says what went wrong, if anything."""
        with self._staging.take() as stage:
            buffers = []
            for number, piece in enumerate(run):
                at = number * self._slot_bytes
                begin = at + BLOCK
                record, page, end = piece.record, piece.view, begin + round_up(piece.view.size)
                if self._in_place(page, page.size):
                    buffers += [stage[at:begin], page]
                else:
                    stage[begin : begin + page.size] = page
                    stage[begin + page.size : end] = 0
                    page = stage[begin : begin + page.size]
                    buffers.append(stage[at:end])
                header = SlotHeader(
                    record.seq, record.length, record.slot, record.key[FORM_DIGEST_BYTES:], form,
                    page_checksum(page),
                )  # fmt: skip
                pack_slot(stage[at:begin].data, header)
            try:
                short = self._slabs.write(run[0].record.slot, buffers) != sum(map(len, buffers))
                wrong = "short write" if short else None
            except OSError as error:
                wrong = f"write error: {error.strerror or error}"
        for piece in run:
            piece.wrong = wrong

    def read(self, run: list[Piece]) -> None:
        """Read one run and check each page; each piece says what is wrong with it, if anything."""
        wrong = self._read(run)
        if wrong is not None and len(run) > 1:  # one bad sector is not to cost its neighbours
            for piece in run:
                self.read([piece])
        elif wrong is not None:
            run[0].wrong = wrong

    def _read(self, run: list[Piece]) -> str | None:
        with self._staging.take() as stage:
            buffers, direct = [], []
            for number, piece in enumerate(run):
                at, length = number * self._slot_bytes, piece.record.length
                direct.append(self._in_place(piece.view, length))
                if direct[-1]:
                    buffers += [stage[at : at + BLOCK], piece.view[:length]]
                else:
                    buffers.append(stage[at : at + BLOCK + round_up(length)])
            try:
                if self._slabs.read(run[0].record.slot, buffers) != sum(map(len, buffers)):
                    return "short read"
            except OSError as error:
                return f"read error: {error.strerror or error}"
            for number, piece in enumerate(run):
                at, length = number * self._slot_bytes, piece.record.length
                begin = at + BLOCK
                page = piece.view[:length] if direct[number] else stage[begin : begin + length]
                piece.wrong = what_is_wrong(stage[at:begin].data, piece.record, page)
                if piece.wrong is None and not direct[number]:
                    piece.view[:length] = page
        return None


def what_is_wrong(block: memoryview, record: Record, page: np.ndarray) -> str | None:
    """Compare a slot's header and bytes with what the index says; None if all agree."""
    try:
        header = read_slot(block)
    except Damaged as error:
        return str(error)
    said = (header.seq, header.slot, header.length)
    if said != (record.seq, record.slot, record.length) or combined(header) != record.key:
        return "another page"
    return None if page_checksum(page) == header.checksum else "page checksum"


def combined(header: SlotHeader) -> bytes:
    """The key that the index has for a slot's header."""
    return form_digest(header.form) + header.key


@functools.lru_cache(maxsize=16)
def form_digest(form: bytes) -> bytes:
    """16 bytes that stand for a form in the index."""
    return hashlib.blake2b(form, digest_size=FORM_DIGEST_BYTES).digest()
