"""What ranks show each other of a call over shared memory in debug mode (`shown_call.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..shown_call import Moved, ShownCall, mismatch, room_of, sizes
from .calls import KINDS, describe

SHARED = ("barrier", "broadcast")  # exchanges in which all ranks have tensors of one size


def shown(code: int, count: int, tensors: Sequence[Tensor], tables: Any, own: int) -> ShownCall:
    """Describe a call.

    Args:
        tensors: whose sizes all ranks must have in common, where nothing is moved by tables.
        tables: of an exchange: what is sent to each rank, and what is expected from each; None for other calls.
    """
    moved: Moved = ([], [])
    kind, root = KINDS[code & 255], (code >> 24) - 1
    if tables is not None and kind not in SHARED:
        sent, received = (np.asarray(table).reshape(-1, 2)[:, 1].tolist() for table in tables)
        if kind == "gather":  # one table, of what anybody may read
            sent = [n * (rank == root) for rank, n in enumerate(sent)]
        elif kind == "scatter" and own != root:
            sent = [0] * len(sent)
        moved = sent, received
    size = "" if moved[0] else sizes(tensors) if tensors else str(count)
    return ShownCall(describe(code, size), *moved)


def letters(call: ShownCall, ranks: int) -> Tensor:
    """Write a call for sending; the same length on all ranks."""
    return torch.frombuffer(bytearray(call.packed(room_of(ranks))), dtype=torch.uint8)


def differing(found: Tensor, ranks: int, names: Sequence[int]) -> str:
    """Read what all ranks sent, and show two calls that do not fit; "" if all do."""
    texts = found.view(ranks, -1)
    return mismatch([ShownCall.unpacked(bytes(text.tolist())) for text in texts], names)
