"""The collectives, as steps: generators that start MPI requests, yield them, and go on when they are complete.

Nothing here waits, so every operation can be driven by the caller, by the progress thread, or by
both, and given up when a peer is lost. The first step of each starts in the order of the calls;
later steps talk point to point on `Peers.inner` under the operation's own tag, so that ranks
may reach them in any order. Which algorithm runs may depend only on what is equal on all ranks
(sizes, never strides), or ranks would talk past each other.

Reductions: MPI's non-blocking all-reduce is several times slower than its blocking one from 1 MB
up (Open MPI, measured in docs/decisions/011-mpi-backend.md), so they are built here from
exchanges and local reductions.
"""

from __future__ import annotations

import ctypes
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from .reduction import Reduction
from .scratch import Room, Scratch
from .swap import MOST_BYTES, Swap, in_pieces
from .wire import Message, Wire, memory, span

# Up to this many gathered bytes everyone sends all to all and reduces alone: one step.
ONE_SHOT_BYTES = 512 * 1024
SEGMENT_BYTES = 1 << 20  # of what is folded at once

Run = tuple[int, int]  # address and bytes
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
        requests.insert(0, requests.pop())
    return not requests


def barrier(peers: Peers) -> Steps:
    yield peers.comm.Ibarrier()


def broadcast(peers: Peers, t: Tensor, root: int) -> Steps:
    twin = peers.wire.lend(t, read=peers.rank == root)
    yield peers.comm.Ibcast(memory(twin), root)
    if peers.rank != root:
        peers.wire.land(twin, t)


def all_reduce(peers: Peers, t: Tensor, by: Reduction, spins: int = 0) -> Steps:
    tag = peers.tag()
    if peers.size == 1:
        return
    twin = peers.wire.lend(t, read=True)
    n = twin.nbytes
    if peers.size * n > ONE_SHOT_BYTES:
        runs = _runs(twin, peers.size)
        own = _elements(twin, runs[peers.rank])
        yield from _reduce_to(peers, own, own, runs, by, tag)
        yield _give_all(peers, own, runs, tag)
    elif by.kernel is not None and twin.is_cpu:
        address = twin.data_ptr()
        yield from peers.swap.reduce(address, 0, address, n, by.kernel, tag, spins)
    else:
        yield from _fold_all(peers, twin, by, tag)
    if twin is not t:
        peers.wire.land(twin, t)


def _fold_all(peers: Peers, t: Tensor, by: Reduction, tag: int) -> Steps:
    """Give everyone the whole and fold in the order of ranks, so that all hold the same bits."""
    room, requests = _receive(peers, t, tag)
    message, rank = memory(t), peers.rank
    yield requests + [peers.inner.Isend(message, r, tag) for r in peers.others]
    before = peers.size - 1 - rank  # the pieces of the ranks after this one come first
    pieces = (*room.pieces[before:], t, *room.pieces[:before])
    by.fold(pieces[0], pieces)
    peers.wire.land(pieces[0], t)
    peers.scratch.give_back(room)


def reduce(peers: Peers, t: Tensor, by: Reduction, root: int) -> Steps:
    tag = peers.tag()
    if peers.size == 1:
        return
    twin = peers.wire.lend(t, read=True)
    runs = _runs(twin, peers.size)
    own = _elements(twin, runs[peers.rank])
    part = own if peers.rank == root else torch.empty_like(own)
    yield from _reduce_to(peers, part, own, runs, by, tag)
    if peers.rank != root:
        yield peers.inner.Isend(memory(part), root, tag)
        return
    yield [peers.inner.Irecv(span(*runs[r]), r, tag) for r in peers.others]
    peers.wire.land(twin, t)


def reduce_scatter(peers: Peers, out: Tensor, inputs: Sequence[Tensor], by: Reduction) -> Steps:
    tag = peers.tag()
    brought = [peers.wire.lend(t, read=True) for t in inputs]
    if peers.size == 1:
        peers.wire.land(brought[0], out)
        return
    twin = peers.wire.lend(out, read=False)
    brought = [b if r == peers.rank else peers.wire.apart(b, twin) for r, b in enumerate(brought)]
    own = brought[peers.rank].view(twin.shape)
    yield from _reduce_to(peers, twin, own, [(b.data_ptr(), b.nbytes) for b in brought], by, tag)
    peers.wire.land(twin, out)


def reduce_scatter_single(
    peers: Peers, out: Tensor, t: Tensor, by: Reduction, spins: int = 0
) -> Steps:
    """The same for parts that lie end to end."""
    tag = peers.tag()
    brought, twin = peers.wire.lend(t, read=True), peers.wire.lend(out, read=False)
    address, n = brought.data_ptr(), twin.nbytes
    if twin.data_ptr() != address + peers.rank * n:
        brought = peers.wire.apart(brought, twin)
        address = brought.data_ptr()
    if peers.size == 1:
        peers.wire.land(brought.view(out.shape), out)
        return
    if peers.size * n <= ONE_SHOT_BYTES and by.kernel is not None and twin.is_cpu:
        yield from peers.swap.reduce(address, n, twin.data_ptr(), n, by.kernel, tag, spins)
    else:
        runs = [(address + r * n, n) for r in range(peers.size)]
        own = brought.view(peers.size, *twin.shape)[peers.rank]
        yield from _reduce_to(peers, twin, own, runs, by, tag)
    if twin is not out:
        peers.wire.land(twin, out)


def _runs(t: Tensor, ranks: int) -> list[Run]:
    """Cut memory into one run of elements per rank, the first ones longer by one."""
    item, address = t.element_size(), t.data_ptr()
    length, longer = divmod(t.numel(), ranks)
    sizes = [(length + (r < longer)) * item for r in range(ranks)]
    return list(zip(itertools.accumulate(sizes, initial=address), sizes, strict=False))


def _elements(t: Tensor, run: Run) -> Tensor:
    item = t.element_size()
    return t.view(-1).narrow(0, (run[0] - t.data_ptr()) // item, run[1] // item)


def _reduce_to(
    peers: Peers, out: Tensor, own: Tensor, runs: Sequence[Run], by: Reduction, tag: int
) -> Steps:
    """Send every rank its run and fold what comes for this one; `out` may be `own`.

    In segments, so that what came is folded while it is in the cache and the next one travels.
    """
    others, item = peers.others, own.element_size()
    step = max(1, SEGMENT_BYTES // (item * len(others)))
    segments, into = _split(own, step), _split(out, step)
    coming = [_receive(peers, s, tag) for s in segments[:1]]
    sends = [
        peers.inner.Isend(span(address + at, min(step * item, n - at)), r, tag)
        for r in others
        for address, n in [runs[r]]
        for at in range(0, n, step * item)
    ]
    for i, segment in enumerate(segments):
        coming += [_receive(peers, s, tag) for s in segments[i + 1 : i + 2]]
        room, requests = coming.pop(0)
        yield requests
        by.fold(into[i], (segment, *room.pieces))
        peers.scratch.give_back(room)
    yield sends


def _split(t: Tensor, step: int) -> Sequence[Tensor]:
    if t.numel() <= step:
        return (t,) if t.numel() else ()
    return t.view(-1).split(step)


def _receive(peers: Peers, like: Tensor, tag: int) -> tuple[Room, list[MPI.Request]]:
    """Begin to receive a tensor like this one from every other rank."""
    room, inner = peers.scratch.take(peers.size - 1, like), peers.inner
    pairs = zip(peers.others, room.messages, strict=True)
    return room, [inner.Irecv(message, r, tag) for r, message in pairs]


def _give_all(peers: Peers, own: Tensor, runs: Sequence[Run], tag: int) -> list[MPI.Request]:
    """Give everyone the own run and take theirs."""
    message, inner = memory(own), peers.inner
    requests = [inner.Irecv(span(*runs[r]), r, tag) for r in peers.others]
    return requests + [inner.Isend(message, r, tag) for r in peers.others]


def all_gather_single(peers: Peers, out: Tensor, t: Tensor, spins: int = 0) -> Steps:
    """Gather equal parts; point to point, which beats MPI's own from 32 KB and equals it below."""
    twin, own = peers.wire.lend(out, read=False), peers.wire.lend(t, read=True)
    yield from _swap(peers, own, 0, twin, own.nbytes, spins)
    if twin is not out:
        peers.wire.land(twin, out)


def _swap(peers: Peers, own: Tensor, step: int, to: Tensor, n: int, spins: int) -> Steps:
    """Send each rank `n` bytes of `own`, `step` bytes apart; put what comes into `to`, end to end."""
    address, goal, ranks = own.data_ptr(), to.data_ptr(), range(peers.size)
    if to.is_cpu and n <= MOST_BYTES:
        yield from peers.swap.move(address, step, goal, n, n, peers.tag(), spins)
    else:
        given = [(address + r * step, n) for r in ranks]
        yield from _exchange(peers, own, given, to, [(goal + r * n, n) for r in ranks])


def _exchange(
    peers: Peers, own: Tensor, given: Sequence[Run], to: Tensor, taken: Sequence[Run]
) -> Steps:
    """Send each rank its run of `own`, and take its run of `to` from each."""
    tag, inner = peers.tag(), peers.inner
    requests = [inner.Irecv(m, r, tag) for r in peers.others for m in _messages(*taken[r])]
    requests += [inner.Isend(m, r, tag) for r in peers.others for m in _messages(*given[r])]
    (home, n), (place, _) = taken[peers.rank], given[peers.rank]
    if to.is_cpu:
        ctypes.memmove(home, place, n)
    elif home != place:
        _elements(to, (home, n)).copy_(_elements(own, (place, n)))
    yield requests


def _messages(address: int, n: int) -> list[Message]:
    """As the kernel cuts it: ranks may differ in which of the two they need."""
    piece = in_pieces(n)
    return [span(address + at, min(piece, n - at)) for at in range(0, max(1, n), max(1, piece))]


def all_gather(peers: Peers, outputs: Sequence[Tensor], t: Tensor) -> Steps:
    """Gather into tensors that may differ in size and lie anywhere."""
    wire, tag = peers.wire, peers.tag()
    own = wire.lend(t, read=True, strided=True)
    twins = [wire.lend(out, read=False, strided=True) for out in outputs]
    message = wire.message(own)
    requests = [peers.inner.Irecv(wire.message(twins[r]), r, tag) for r in peers.others]
    requests += [peers.inner.Isend(message, r, tag) for r in peers.others]
    twins[peers.rank].copy_(own)
    yield requests
    for twin, out in zip(twins, outputs, strict=True):
        wire.land(twin, out)


def all_to_all_single(
    peers: Peers,
    out: Tensor,
    t: Tensor,
    receive: Sequence[int],
    send: Sequence[int],
    spins: int = 0,
) -> Steps:
    """Exchange runs of rows of dim 0; empty counts mean equal runs. Ranks may differ in whether they give counts."""
    twin, own = peers.wire.lend(out, read=False), peers.wire.lend(t, read=True)
    own = peers.wire.apart(own, twin)  # MPI may receive before it sends
    if send or receive:
        even = [(t.shape[0] if t.dim() else 1) // peers.size] * peers.size
        runs = _by_rows(own, send or even), _by_rows(twin, receive or even)
        yield from _exchange(peers, own, runs[0], twin, runs[1])
    else:
        n = own.nbytes // peers.size
        yield from _swap(peers, own, n, twin, n, spins)
    if twin is not out:
        peers.wire.land(twin, out)


def _by_rows(t: Tensor, rows: Sequence[int]) -> list[Run]:
    row = t.nbytes // max(1, t.shape[0] if t.dim() else 1)
    ends = itertools.accumulate((n * row for n in rows), initial=t.data_ptr())
    return [(address, n * row) for address, n in zip(ends, rows, strict=False)]


def all_to_all(peers: Peers, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Steps:
    wire, tag = peers.wire, peers.tag()
    own = [wire.lend(t, read=True, strided=True) for t in inputs]
    twins = [wire.lend(out, read=False, strided=True) for out in outputs]
    requests = [peers.inner.Irecv(wire.message(twins[r]), r, tag) for r in peers.others]
    requests += [peers.inner.Isend(wire.message(own[r]), r, tag) for r in peers.others]
    twins[peers.rank].copy_(own[peers.rank])
    yield requests
    for twin, out in zip(twins, outputs, strict=True):
        wire.land(twin, out)


def gather(peers: Peers, outputs: Sequence[Tensor], t: Tensor, root: int) -> Steps:
    wire, tag = peers.wire, peers.tag()
    own = wire.lend(t, read=True, strided=True)
    if peers.rank != root:
        yield peers.inner.Isend(wire.message(own), root, tag)
        return
    twins = [wire.lend(out, read=False, strided=True) for out in outputs]
    requests = [peers.inner.Irecv(wire.message(twins[r]), r, tag) for r in peers.others]
    twins[root].copy_(own)
    yield requests
    for twin, out in zip(twins, outputs, strict=True):
        wire.land(twin, out)


def scatter(peers: Peers, out: Tensor, inputs: Sequence[Tensor], root: int) -> Steps:
    wire, tag = peers.wire, peers.tag()
    twin = wire.lend(out, read=False, strided=True)
    if peers.rank != root:
        yield peers.inner.Irecv(wire.message(twin), root, tag)
    else:
        own = [wire.lend(t, read=True, strided=True) for t in inputs]
        twin.copy_(own[root])
        yield [peers.inner.Isend(wire.message(own[r]), r, tag) for r in peers.others]
    wire.land(twin, out)


def send(peers: Peers, t: Tensor, to: int, tag: int) -> Steps:
    own = peers.wire.lend(t, read=True, strided=True)
    yield peers.comm.Isend(peers.wire.message(own), to, tag)


def together(many: Sequence[Steps]) -> Steps:
    """Start several operations at once, and finish them in order."""
    if len(many) == 1:
        yield from many[0]
        return
    started = [(steps, next(steps, None)) for steps in many]
    for steps, requests in started:
        while requests is not None:
            yield requests
            requests = next(steps, None)
