"""Room for what other ranks send, kept for the next call of the same size.

The pages of fresh memory cost more than the messages themselves, up to some MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .wire import Message, memory

KEPT = 16  # rooms

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


class Scratch:
    """Rooms of one group; of 1 MiB at most, for what is larger comes in segments.

    State: rooms that nobody uses now. A dictionary's own steps are whole between threads.
    """

    def __init__(self) -> None:
        self._free: dict[Key, Room] = {}

    def take(self, ranks: int, like: Tensor) -> Room:
        """Get room for tensors like this one from so many ranks."""
        key = (ranks, like.shape, like.dtype, like.device)
        return self._free.pop(key, None) or _build(key)

    def give_back(self, room: Room) -> None:
        """Keep a room for the next call."""
        if len(self._free) >= KEPT:
            self._free.clear()
        self._free[room.key] = room


def _build(key: Key) -> Room:
    ranks, shape, dtype, device = key
    with torch.inference_mode(False):
        whole = torch.empty((ranks, *shape), dtype=dtype, device=device)
    pieces = whole.unbind()
    return Room(key, pieces, [memory(p) for p in pieces])
