"""What the operations of a group share: its communicators, and steps.

Operations are written as steps: generators that start MPI requests, yield them, and go on when they are complete.
Nothing in them waits, so every operation can be driven by the caller, by the progress thread, or by
both, and given up when a peer is lost. The first step of each starts in the order of the calls;
later steps talk point to point on `Peers.inner` under the operation's own tag, so that ranks
may reach them in any order. Which algorithm runs may depend only on what is equal on all ranks
(sizes, never strides), or ranks would talk past each other. Tensors are lent before the tag is taken: a
rank whose tensor is refused has taken no part.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI
from torch import Tensor

from ..sendable import check_sendable
from .scratch import Scratch
from .swap import Swap
from .wire import Wire

Requests = Any  # a request or what stands for it (`arrival.py`), or a list of requests
Steps = Iterator[Requests]


@dataclass
class Peers:
    """The communicators of one group, and this rank's place in it.

    Attributes:
        others: the other ranks, in the order in which this one talks to them.
        awaited: the receives whose messages have not come, in the order of their calls.
    """

    comm: MPI.Intracomm
    inner: MPI.Intracomm
    wire: Wire
    rank: int
    size: int
    scratch: Scratch = field(default_factory=Scratch)
    swap: Swap = field(init=False)
    others: tuple[int, ...] = field(init=False)
    awaited: list[Any] = field(default_factory=list)
    _tags: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.swap = Swap(self.inner)
        # starting after this one: no rank is everybody's first
        self.others = (*range(self.rank + 1, self.size), *range(self.rank))
        bound = self.inner.Get_attr(MPI.TAG_UB)
        assert isinstance(bound, int)
        self._tags = itertools.cycle(range(bound + 1))

    def tag(self) -> int:
        """Number an operation: every rank of the group calls it for every operation, in order."""
        return next(self._tags)


def tag_of(name: str) -> int:
    """Number a name, the same on all ranks, within what every MPI allows."""
    return zlib.crc32(name.encode()) % 32768


def meet(comm: MPI.Intracomm, ranks: Sequence[int], name: str) -> Steps:
    """Hold these ranks of `comm` until all are there."""
    tag, nothing = tag_of(name), [bytearray(0), 0, MPI.BYTE]
    first, rest = ranks[0], ranks[1:]
    if comm.rank == first:
        yield [comm.Irecv(nothing, r, tag) for r in rest]
        yield [comm.Isend(nothing, r, tag) for r in rest]
    else:
        yield [comm.Isend(nothing, first, tag), comm.Irecv(nothing, first, tag)]


def complete(requests: Requests) -> bool:
    """Test requests, dropping those that are complete; say whether all are.

    One that is not complete is tested again after all others: it may wait for a rank that gave up because of another's
    death, which only the request to the dead tells.
    """
    if not isinstance(requests, list):
        return requests.Test()
    while requests and requests[-1].Test():
        requests.pop()
    if requests:
        requests.insert(
            0, requests[-1]
        )  # and then removed there: an interruption in between loses none
        del requests[-1]
    return not requests


def together(many: Sequence[Steps], tensors: Sequence[Tensor]) -> Steps:
    """Start several operations at once, and finish them in order.

    Args:
        tensors: all of theirs: none may be refused after the first has started.
    """
    if len(many) == 1:
        yield from many[0]
        return
    check_sendable("mpi", tensors)
    started = [(steps, next(steps, None)) for steps in many]
    for steps, requests in started:
        while requests is not None:
            yield requests
            requests = next(steps, None)


def barrier(peers: Peers) -> Steps:
    yield peers.comm.Ibarrier()
