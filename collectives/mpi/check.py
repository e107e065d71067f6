"""How ranks show each other their calls over MPI in debug mode (`shown_call.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI

from ..errors import CallMismatch
from ..shown_call import ShownCall, mismatch, room_of
from .peers import Peers, Steps
from .wire import Message


def compare(peers: Peers, ranks: Sequence[int], call: ShownCall, group: str) -> Steps:
    """Show a call to all other ranks and look at theirs.

    Raises:
        CallMismatch: two ranks are in different calls; the same on every rank.
    """
    tag, inner = peers.tag(), peers.inner
    room = room_of(peers.size)
    own = call.packed(room)
    found = {r: bytearray(room) for r in peers.others}
    yield [inner.Irecv(_whole(text), r, tag) for r, text in found.items()] + [
        inner.Isend(_whole(own), r, tag) for r in found
    ]
    calls = [call if r == peers.rank else ShownCall.unpacked(found[r]) for r in range(peers.size)]
    if why := mismatch(calls, ranks):
        raise CallMismatch(f"ranks of {group} made different calls: {why}")


def _whole(text: bytes | bytearray) -> Message:
    return [text, len(text), MPI.BYTE]
