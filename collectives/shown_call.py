"""The debug mode: ranks show each other every collective before they start it, so a mismatch has two sides.

On at torch's debug level DETAIL (`TORCH_DISTRIBUTED_DEBUG=DETAIL`, or `torch.distributed.set_debug_level`), which all
ranks must have. Every call then waits for all others, the asynchronous ones too, as in torch's own debug mode. How
the calls travel is each backend's. (shm compares headers in every call, but a root looks at nobody it only sends to.)
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

DETAIL = dist.DebugLevel.DETAIL.value  # numbers are compared in a third of the time of levels
MOST_LETTERS = 100  # of the sizes in a call's text, which has a room of fixed length
Moved = tuple[list[int], list[int]]  # elements for each rank, and from each, where they may differ


@dataclass(frozen=True)
class ShownCall:
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
    ) -> ShownCall:
        """Describe a call by its name, its tensors and its options."""
        what = name
        if tensors:
            what += f" of {'' if sent or received else sizes(tensors) + ' '}{_dtypes(tensors)}"
        if hasattr(opts, "reduceOp"):
            what += f" by {dist.ReduceOp.RedOpType(opts.reduceOp.op.value).name.lower()}"
        if hasattr(opts, "rootRank"):
            what += f", root {opts.rootRank}"
        return ShownCall(what, sent, received)

    def __str__(self) -> str:
        if not (self.sent or self.received):
            return self.what
        return f"{self.what} (elements sent {self.sent}, received {self.received})"

    def packed(self, room: int) -> bytes:
        """Write it for sending."""
        return json.dumps(asdict(self)).encode().ljust(room)

    @staticmethod
    def unpacked(text: bytes | bytearray) -> ShownCall:
        """Read what another rank sent."""
        return ShownCall(**json.loads(text))

    def fits(self, own: int, other: ShownCall, peer: int) -> bool:
        """Say whether two ranks are in one call, and what each sends the other is what it expects."""
        if self.what != other.what:
            return False
        there = not other.sent or not self.received or other.sent[own] == self.received[peer]
        back = not self.sent or not other.received or self.sent[peer] == other.received[own]
        return there and back


def sizes(tensors: Sequence[Tensor]) -> str:
    """Write tensors' sizes: elements, or the shape if there are several dims; of many tensors what tells them apart."""
    each = [str(t.numel()) if t.dim() < 2 else str(list(t.shape)) for t in tensors]
    text = " + ".join(each)
    if len(text) <= MOST_LETTERS:
        return text
    number = zlib.crc32(text.encode())
    return f"{sum(t.numel() for t in tensors)} elements in {len(tensors)} tensors (shapes no. {number:08x})"


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors))


def room_of(ranks: int) -> int:
    """Give the bytes in which any call of a group of so many ranks can be written."""
    return 256 + 2 * 24 * ranks


def is_on() -> bool:
    """Say whether calls are to be compared."""
    return dist.get_debug_level().value == DETAIL


def mismatch(calls: Sequence[ShownCall], names: Sequence[int]) -> str:
    """Show two calls that do not fit each other, by the ranks' names in the world; "" if all do."""
    for a, b in itertools.combinations(range(len(calls)), 2):
        if not calls[a].fits(a, calls[b], b):
            return f"rank {names[a]} is in {calls[a]}, rank {names[b]} in {calls[b]}"
    return ""
