"""What to tell the person when ranks stop talking: words only, nothing is sent here."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from .rollcall import Answer

# Classes of a fault-tolerant MPI (ULFM); other libraries do not have them.
LOST = {
    getattr(MPI, name)
    for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    if getattr(MPI, name, MPI.ERR_UNKNOWN) != MPI.ERR_UNKNOWN
}


def text(name: str = "", shape: torch.Size | None = None, dtype: torch.dtype | None = None) -> str:
    """Show a call: its name, and its first tensor."""
    if shape is None:
        return name
    return f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}"


def where(rank: int, answer: Answer | None, left: str | None, call: int | None, doing: str) -> str:
    """Say where a rank is; empty if it waits in the same call as this one.

    Args:
        answer: what it said of the group; None if it said nothing.
        left: the error it ended with.
        call: number of the collective that waits for it; None for a message.
    """
    if left is not None:
        return f"rank {rank} has ended with {left}"
    if answer is None:
        return f"rank {rank} does not answer: it is dead or stopped"
    if answer.get("gone"):
        return f"rank {rank} is alive but will not come: there {answer['gone']}"
    place: Any = "before its first collective"
    if answer["doing"]:
        place = f"{'after' if answer['done'] else 'in'} call {answer['calls']}, {answer['doing']}"
    if call is None:
        return f"rank {rank} is alive, {place}"
    if answer["calls"] < call or answer["done"]:
        return f"rank {rank} is alive but has not come: it is {place}"
    return "" if answer["doing"] == doing else f"rank {rank} waits {place}"
