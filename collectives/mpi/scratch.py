"""Room for what other ranks send, kept for the next call of the same size.

The pages of fresh memory cost more than the messages themselves, up to some MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from .wire import Message, memory

KEPT_BYTES = 16 << 20

Key = tuple[int, torch.Size, torch.dtype, torch.device]


@dataclass(frozen=True)
class Room:
    """One tensor per rank.

    Attributes:
        messages: each piece, as MPI receives into it.
    """

    key: Key
    pieces: tuple[Tensor, ...]
    messages: list[Message]
    n_bytes: int


class Scratch:
    """Rooms of one group.

    State: rooms that nobody uses now, up to `KEPT_BYTES` in all.
    """

    def __init__(self) -> None:
        self._free: dict[Key, Room] = {}
        self._bytes = 0
        self._lock = Lock()

    def take(self, ranks: int, like: Tensor) -> Room:
        """Get room for tensors like this one from so many ranks."""
        key = (ranks, like.shape, like.dtype, like.device)
        with self._lock:
            room = self._free.pop(key, None)
            if room is not None:
                self._bytes -= room.n_bytes
                return room
        return _build(key)

    def give_back(self, room: Room) -> None:
        """Keep a room for the next call."""
        with self._lock:
            if self._bytes + room.n_bytes > KEPT_BYTES:
                self._free.clear()
                self._bytes = 0
            if room.n_bytes <= KEPT_BYTES and room.key not in self._free:
                self._free[room.key] = room
                self._bytes += room.n_bytes


def _build(key: Key) -> Room:
    ranks, shape, dtype, device = key
    with torch.inference_mode(False):
        whole = torch.empty((ranks, *shape), dtype=dtype, device=device)
    pieces = whole.unbind()
    return Room(key, pieces, [memory(p) for p in pieces], whole.nbytes)
