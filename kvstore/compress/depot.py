"""Bytes of any length in tiers of pages: cut, sealed with their key, and given back whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections import Counter

import numpy as np
import xxhash

from ..tiers import PageForm, Tier, TierError, TierStack

CHUNK_BYTES = 64 << 10
# checksum with the key; checksum of the whole; chunks; bytes here
_HEAD = struct.Struct("<16s16sII")


class Depot:
    """Parcels by key.

    A parcel that was put again replaces the old one. One of which any chunk is missing, damaged, or of another time
    is a miss.

    Attributes:
        counts: parcels put, found, missed and refused (no tier had room).

    State: the store holds its lock around every call.
    """

    def __init__(self, tiers: dict[str, Tier]) -> None:
        self.stack = TierStack(tiers)
        self.counts: Counter[str] = Counter(dict.fromkeys(("put", "found", "missed", "refused"), 0))

    @staticmethod
    def form(identity: bytes) -> PageForm:
        """What a disk tier writes beside each chunk."""
        return PageForm(identity.hex(), "kept")

    def put(self, key: bytes, data: bytes) -> bool:
        """Keep a parcel, durably; False if the tiers have no room for all of it."""
        self.remove(key)
        room, whole = CHUNK_BYTES - _HEAD.size, xxhash.xxh3_128_digest(data)
        pieces = [data[at : at + room] for at in range(0, max(1, len(data)), room)]
        keys = _names(key, 0, len(pieces))
        chunks = []
        for name, piece in zip(keys, pieces, strict=True):
            head = _HEAD.pack(b"", whole, len(pieces), len(piece))
            chunk = np.frombuffer(head + piece, np.uint8).copy()
            chunk[:16] = np.frombuffer(_seal(name, chunk), np.uint8)
            chunks.append(chunk)
        self.stack.put(keys, chunks)
        with contextlib.suppress(TierError):  # what could not be made durable is not held
            self.stack.commit()
        held = all(self.stack.contains(keys))  # a memory tier may have lost the first for the last
        if not held:
            self.stack.remove(keys)
        self.counts["put" if held else "refused"] += 1
        return held

    def get(self, key: bytes) -> bytes | None:
        """Give a parcel back, or None."""
        first = self._read(_names(key, 0, 1))
        rest = None if first is None else self._read(_names(key, 1, first[0][1]))
        if first is not None and rest is not None:
            data = b"".join(piece for _, _, piece in first + rest)
            if xxhash.xxh3_128_digest(data) == first[0][0]:
                self.counts["found"] += 1
                return data
        self.counts["missed"] += 1
        return None

    def contains(self, keys: list[bytes]) -> list[bool]:
        """Say of which parcels there is something."""
        return self.stack.contains([name for key in keys for name in _names(key, 0, 1)])

    def remove(self, key: bytes) -> None:
        """Forget a parcel."""
        first = self._read(_names(key, 0, 1))
        count = 1 if first is None else first[0][1]
        self.stack.remove(_names(key, 0, count))

    def _read(self, keys: list[bytes]) -> list[tuple[bytes, int, bytes]] | None:
        """Chunks: checksum of the whole, number of chunks, bytes; None if one is not what was put."""
        buffers = np.zeros((len(keys), CHUNK_BYTES), np.uint8)
        out = []
        lengths = self.stack.get(keys, list(buffers)) if keys else []
        for name, length, row in zip(keys, lengths, buffers, strict=True):
            if length is None or length < _HEAD.size:
                return None
            seal, whole, count, size = _HEAD.unpack_from(row.data)
            if size != length - _HEAD.size or seal != _seal(name, row[:length]):
                return None
            out.append((whole, count, row[_HEAD.size : length].tobytes()))
        return out


def _names(key: bytes, first: int, stop: int) -> list[bytes]:
    return [
        hashlib.blake2b(i.to_bytes(8, "little"), key=key[:64], digest_size=32).digest()
        for i in range(first, stop)
    ]


def _seal(name: bytes, chunk: np.ndarray) -> bytes:
    state = xxhash.xxh3_128(name)
    state.update(chunk[16:].data)
    return state.digest()
