"""Whether ranks are in the same call: what they show each other in debug mode (`shown_call.py`), and the errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CallMismatch
from ..shown_call import Moved, ShownCall, mismatch, room_of, sizes
from .calls import KINDS, describe
from .members import Members
from .steps import CODE, COUNT, SENT, STEP, STUCK, line_bytes

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


def stuck(members: Members, state: Any, code: int, count: int, received: Any) -> CallMismatch:
    """Make the error of a kernel that has met another call.

    Args:
        received: of an exchange: what is expected of each rank, first element and number; then that rank may be in the
            same call, and send another number.
    """
    other = int(state[STUCK])
    line = (2 * other + int(state[STEP]) % 2) * line_bytes(members.ranks) // 8
    header = members.segment.words[line : line + SENT]
    own_name, name = members.called(members.rank), members.called(other)
    said = (
        f"rank {own_name} is in {describe(code, count)}, "
        f"rank {name} in {describe(int(header[CODE]), int(header[COUNT]))}"
    )
    if received is not None and header[CODE] == code:
        said += (
            f"; rank {own_name} has room for {received[other, 1]} elements of rank {name}, "
            "which sends it another number"
        )
    return different(members, said)


def different(members: Members, why: str) -> CallMismatch:
    """Make the error of two ranks in different calls."""
    return CallMismatch(f"ranks of group {members.name!r} made different calls: {why}")
