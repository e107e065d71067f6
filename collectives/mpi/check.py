"""The debug mode: ranks show each other every collective before they start it, so a mismatch has two sides.

On at torch's debug level DETAIL (`TORCH_DISTRIBUTED_DEBUG=DETAIL`, or `torch.distributed.set_debug_level`), which all
ranks must have. Every call then waits for all others, the asynchronous ones too, as in torch's own debug mode.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from ..errors import CallMismatch
from .exchange import Peers, Steps
from .wire import Message

TEXT_BYTES, COUNT_BYTES = 256, 24
DETAIL = dist.DebugLevel.DETAIL.value  # numbers are compared in a third of the time of levels


Moved = tuple[list[int], list[int]]  # elements for each rank, and from each, where they may differ


@dataclass(frozen=True)
class Call:
    """What a rank is about to do.

    Attributes:
        what: in words, the same on all ranks.
        sent: elements for each rank, where they may differ; what one sends the other must expect.
    """

    what: str
    sent: list[int]
    received: list[int]

    @staticmethod
    def of(
        name: str, tensors: Sequence[Tensor], opts: Any, sent: list[int], received: list[int]
    ) -> Call:
        """Describe a call by its name, its tensors and its options."""
        what = name
        if tensors:
            count = "" if sent or received else f"{sum(t.numel() for t in tensors)} "
            what += f" of {count}{str(tensors[0].dtype).removeprefix('torch.')}"
        if hasattr(opts, "reduceOp"):
            what += f" by {dist.ReduceOp.RedOpType(opts.reduceOp.op.value).name.lower()}"
        if hasattr(opts, "rootRank"):
            what += f", root {opts.rootRank}"
        return Call(what, sent, received)

    def __str__(self) -> str:
        if not (self.sent or self.received):
            return self.what
        return f"{self.what} (elements sent {self.sent}, received {self.received})"

    def fits(self, own: int, other: Call, peer: int) -> bool:
        """Say whether two ranks are in one call, and what each sends the other is what it expects."""
        if self.what != other.what:
            return False
        there = not other.sent or not self.received or other.sent[own] == self.received[peer]
        back = not self.sent or not other.received or self.sent[peer] == other.received[own]
        return there and back


def is_on() -> bool:
    """Say whether calls are to be compared."""
    return dist.get_debug_level().value == DETAIL


def compare(peers: Peers, ranks: Sequence[int], call: Call, group: str) -> Steps:
    """Show a call to all other ranks and look at theirs.

    Raises:
        CallMismatch: two ranks are in different calls; the same on every rank.
    """
    tag, inner = peers.tag(), peers.inner
    room = TEXT_BYTES + 2 * COUNT_BYTES * peers.size
    own = json.dumps(asdict(call)).encode().ljust(room)
    found = {r: bytearray(room) for r in peers.others}
    yield [inner.Irecv(_whole(text), r, tag) for r, text in found.items()] + [
        inner.Isend(_whole(own), r, tag) for r in found
    ]
    calls = [call if r == peers.rank else Call(**json.loads(found[r])) for r in range(peers.size)]
    for a, b in itertools.combinations(range(peers.size), 2):
        if not calls[a].fits(a, calls[b], b):
            raise CallMismatch(
                f"ranks of {group} made different calls: rank {ranks[a]} is in {calls[a]}, "
                f"rank {ranks[b]} in {calls[b]}"
            )


def _whole(text: bytes | bytearray) -> Message:
    return [text, len(text), MPI.BYTE]
