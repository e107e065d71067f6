"""What stands on disk, byte by byte; docs/kv-format.md says the same in words."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from .errors import FormatTooNew
from .tier import MAX_KEY_BYTES

VERSION = 1
BLOCK = 4096  # the first of a slot, of a slab and of the index is its header
SLOT, SLAB, INDEX = 1, 2, 3
MAX_FORM_BYTES = 2048
FORM_DIGEST_BYTES = 16
RECORD_BYTES = 128
HELD, DROPPED, OPENED, END = 1, 2, 3, 4  # kinds of record

_MAGIC = b"plaitKV"
_START = struct.Struct("<7sBBB6x")  # magic, kind of block, version, 255 - version
_SLOT = struct.Struct("<QQIHBx16s64s")  # seq, length, slot, form bytes, key bytes, checksum, key
_GEOMETRY = struct.Struct("<QII")  # slot bytes, slots in a slab, number of the slab
# kind, key bytes, slot, seq, length, key; then 8 of checksum
_RECORD = struct.Struct("<BB2xIQQ80s16x")
_FORM_AT = _START.size + _SLOT.size + 8
_SEAL_AT = BLOCK - 16


class Damaged(Exception):
    """A block or page on disk is not what it should be; the text says how. Never leaves the tier."""


@dataclass(frozen=True)
class PageForm:
    """What a page's bytes mean. A page is only given to who asks with the form it was put with.

    Args:
        identity: fingerprint of all that the numbers depend on: weights, RoPE settings, layout, plan shard.
        codec, dtype, shape: how to read the bytes.
    """

    identity: str = ""
    codec: str = "none"
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.encode()) > MAX_FORM_BYTES:
            raise ValueError(
                f"the form of a page takes {len(self.encode())} bytes, at most {MAX_FORM_BYTES} are kept; "
                "make identity a digest"
            )

    def encode(self) -> bytes:
        """The form as it stands in every slot."""
        parts = {
            "codec": self.codec,
            "dtype": self.dtype,
            "identity": self.identity,
            "shape": self.shape,
        }
        return json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> bytes:
        """16 bytes that stand for the form in the index."""
        return hashlib.blake2b(self.encode(), digest_size=FORM_DIGEST_BYTES).digest()


class Geometry(NamedTuple):
    """How a directory is cut: the same for all its slabs, for life."""

    slot_bytes: int
    slots_per_slab: int

    @property
    def slab_bytes(self) -> int:
        """Length of a slab file."""
        return BLOCK + self.slot_bytes * self.slots_per_slab

    @property
    def page_bytes(self) -> int:
        """Bytes of the largest page."""
        return self.slot_bytes - BLOCK


class SlotHeader(NamedTuple):
    """The first block of a slot: which page is here. `checksum` is of the page's bytes."""

    seq: int
    length: int
    slot: int
    key: bytes
    form: bytes
    checksum: bytes


class Record(NamedTuple):
    """A line of the index: what a slot holds since then. `key` begins with the form's digest."""

    kind: int
    slot: int
    seq: int
    length: int = 0
    key: bytes = b""


def page_checksum(page: np.ndarray) -> bytes:
    """16 bytes of xxh3."""
    return xxhash.xxh3_128_digest(page.data)


def _start(block: Any, kind: int) -> None:
    block[:BLOCK] = bytes(BLOCK)
    _START.pack_into(block, 0, _MAGIC, kind, VERSION, 255 - VERSION)


def _seal(block: Any) -> None:
    block[_SEAL_AT:BLOCK] = xxhash.xxh3_128_digest(block[:_SEAL_AT])


def _check(block: Any, kind: int) -> None:
    """Raise unless a block is whole, of this kind and of a version we read.

    Raises:
        Damaged: not a block of ours, or changed.
        FormatTooNew: written by a later version. The first 16 bytes are the same in every version.
    """
    magic, found_kind, version, inverse = _START.unpack_from(block)
    if magic != _MAGIC:
        raise Damaged("empty" if not any(block) else "no header")
    if version > VERSION and inverse == 255 - version:
        raise FormatTooNew("a cache directory", version, VERSION)
    if bytes(block[_SEAL_AT:BLOCK]) != xxhash.xxh3_128_digest(block[:_SEAL_AT]):
        raise Damaged("header checksum")
    if found_kind != kind or version != VERSION:
        raise Damaged(f"header of kind {found_kind}, version {version}")


def pack_slot(block: memoryview, header: SlotHeader) -> None:
    """Write a slot's header into its block."""
    _start(block, SLOT)
    sizes = len(header.form), len(header.key)
    _SLOT.pack_into(
        block,
        _START.size,
        header.seq,
        header.length,
        header.slot,
        *sizes,
        header.checksum,
        header.key,
    )
    block[_FORM_AT : _FORM_AT + len(header.form)] = header.form
    _seal(block)


def read_slot(block: memoryview) -> SlotHeader:
    """Read a slot's header.

    Raises:
        Damaged: saying how.
    """
    try:
        _check(block, SLOT)
    except FormatTooNew as error:
        raise Damaged(f"format version {error.found}") from error
    seq, length, slot, form_bytes, key_bytes, checksum, key = _SLOT.unpack_from(block, _START.size)
    if form_bytes > MAX_FORM_BYTES or not 1 <= key_bytes <= MAX_KEY_BYTES:
        raise Damaged("header fields")
    form = bytes(block[_FORM_AT : _FORM_AT + form_bytes])
    return SlotHeader(seq, length, slot, key[:key_bytes], form, checksum)


def form_of(header: SlotHeader) -> dict[str, Any]:
    """A header's form for a person; what it says is only shown, never used."""
    try:
        said = json.loads(header.form)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def pack_geometry(kind: int, geometry: Geometry, number: int = 0) -> bytes:
    """Make the first block of a slab or of the index."""
    block = bytearray(BLOCK)
    _start(block, kind)
    _GEOMETRY.pack_into(block, _START.size, *geometry, number)
    _seal(block)
    return bytes(block)


def read_geometry(block: bytes, kind: int) -> tuple[Geometry, int]:
    """Read the first block of a slab (with its number) or of the index.

    Raises:
        Damaged: saying how.
        FormatTooNew: written by a later version.
    """
    _check(block, kind)
    slot_bytes, slots_per_slab, number = _GEOMETRY.unpack_from(block, _START.size)
    if slot_bytes < 2 * BLOCK or slot_bytes % BLOCK or not 1 <= slots_per_slab < 1 << 31:
        raise Damaged("header fields")
    return Geometry(slot_bytes, slots_per_slab), number


def pack_record(record: Record, number: int) -> bytes:
    """Make one line of the index; its checksum also binds it to its place."""
    line = _RECORD.pack(
        record.kind, len(record.key), record.slot, record.seq, record.length, record.key
    )
    return line + xxhash.xxh3_64_intdigest(line, number).to_bytes(8, "little")


def read_record(line: bytes, number: int) -> Record | None:
    """Read one line of the index; None if it is damaged or was never written."""
    body = line[: _RECORD.size]
    if xxhash.xxh3_64_intdigest(body, number).to_bytes(8, "little") != line[_RECORD.size :]:
        return None
    kind, key_bytes, slot, seq, length, key = _RECORD.unpack(body)
    return Record(kind, slot, seq, length, key[:key_bytes])
