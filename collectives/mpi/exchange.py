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
from functools import lru_cache
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from .reduction import Reduction
from .scratch import Room, Scratch
from .wire import Wire, memory, span

# Up to this many gathered bytes everyone sends all to all and reduces alone: one step.
ONE_SHOT_BYTES = 512 * 1024
SEGMENT_BYTES = 1 << 20  # of what is folded at once

Run = tuple[int, int]  # address and bytes
Requests = MPI.Request | list[MPI.Request]
Steps = Iterator[Requests]


@dataclass
class Peers:
    """The communicators of one group, and this rank's place in it.

    Attributes:
        others: the other ranks, in the order in which this one talks to them.
    """

    comm: MPI.Intracomm
    inner: MPI.Intracomm
    wire: Wire
    rank: int
    size: int
    scratch: Scratch = field(default_factory=Scratch)
    others: tuple[int, ...] = field(init=False)
    _tags: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
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
    """Test requests, dropping those that are complete; say whether all are."""
    if isinstance(requests, MPI.Request):
        return requests.Test()
    while requests and requests[-1].Test():
        requests.pop()
    return not requests


def barrier(peers: Peers) -> Steps:
    yield peers.comm.Ibarrier()


def broadcast(peers: Peers, t: Tensor, root: int) -> Steps:
    twin = peers.wire.lend(t, read=peers.rank == root)
    yield peers.comm.Ibcast(memory(twin), root)
    if peers.rank != root:
        peers.wire.land(twin, t)


def all_reduce(peers: Peers, t: Tensor, by: Reduction) -> Steps:
    tag = peers.tag()
    if peers.size == 1:
        return
    twin = peers.wire.lend(t, read=True)
    if peers.size * twin.nbytes <= ONE_SHOT_BYTES:
        yield from _fold_all(peers, twin, by, tag)
    else:
        runs = _runs(twin, peers.size)
        own = _elements(twin, runs[peers.rank])
        yield from _reduce_to(peers, own, own, runs, by, tag)
        yield _give_all(peers, own, runs, tag)
    peers.wire.land(twin, t)


def _fold_all(peers: Peers, t: Tensor, by: Reduction, tag: int) -> Steps:
    """Give everyone the whole and fold in the order of ranks, so that all hold the same bits."""
    room, requests = _receive(peers, t, tag)
    message, rank = memory(t), peers.rank
    yield requests + [peers.inner.Isend(message, r, tag) for r in peers.others]
    before = peers.size - 1 - rank  # the pieces of the ranks after this one come first
    pieces = (*room.pieces[before:], t, *room.pieces[:before])
    by.fold(pieces[0], pieces)
    bring(pieces[0], t)
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
    own = brought[peers.rank].view(twin.shape)
    yield from _reduce_to(peers, twin, own, [(b.data_ptr(), b.nbytes) for b in brought], by, tag)
    peers.wire.land(twin, out)


def reduce_scatter_single(peers: Peers, out: Tensor, t: Tensor, by: Reduction) -> Steps:
    """The same for parts that lie end to end."""
    tag = peers.tag()
    brought, twin = peers.wire.lend(t, read=True), peers.wire.lend(out, read=False)
    if peers.size == 1:
        peers.wire.land(brought.view(out.shape), out)
        return
    address, n, rank = brought.data_ptr(), twin.nbytes, peers.rank
    if n * (peers.size - 1) > SEGMENT_BYTES:
        runs = [(address + r * n, n) for r in range(peers.size)]
        own = brought.view(peers.size, *twin.shape)[rank]
        yield from _reduce_to(peers, twin, own, runs, by, tag)
    else:  # one message to each rank: what Python must prepare is prepared while they travel
        room, requests = _receive(peers, twin, tag)
        requests += [peers.inner.Isend(span(address + r * n, n), r, tag) for r in peers.others]
        if twin.is_cpu:
            ctypes.memmove(twin.data_ptr(), address + rank * n, n)
        else:
            twin.copy_(brought.view(peers.size, *twin.shape)[rank])
        yield requests
        by.fold(twin, (twin, *room.pieces))
        peers.scratch.give_back(room)
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


def bring(piece: Tensor, home: Tensor) -> None:
    """Copy a piece into another of the same kind."""
    if piece is home:
        return
    if home.is_cpu:
        # a fifth of the time of torch's copy
        ctypes.memmove(home.data_ptr(), piece.data_ptr(), home.nbytes)
    else:
        home.copy_(piece)


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


def all_gather_single(peers: Peers, out: Tensor, t: Tensor) -> Steps:
    """Gather equal parts; point to point, which beats MPI's own from 32 KB and equals it below."""
    tag = peers.tag()
    twin, own = peers.wire.lend(out, read=False), peers.wire.lend(t, read=True)
    address, n = twin.data_ptr(), own.nbytes
    runs = [(address + r * n, n) for r in range(peers.size)]
    requests = _give_all(peers, own, runs, tag)
    home = runs[peers.rank][0]
    if twin.is_cpu:
        ctypes.memmove(home, own.data_ptr(), n)  # a fifth of the time of torch's copy
    elif home != own.data_ptr():
        _elements(twin, runs[peers.rank]).copy_(own.view(-1))
    yield requests
    peers.wire.land(twin, out)


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
    peers: Peers, out: Tensor, t: Tensor, receive: Sequence[int], send: Sequence[int]
) -> Steps:
    """Exchange runs of rows of dim 0; empty counts mean equal runs."""
    twin, own = peers.wire.lend(out, read=False), peers.wire.lend(t, read=True)
    ranks = peers.size
    yield peers.comm.Ialltoallv(_by_rows(own, send, ranks), _by_rows(twin, receive, ranks))
    peers.wire.land(twin, out)


def _by_rows(t: Tensor, rows: Sequence[int], size: int) -> list[Any]:
    length = t.shape[0] if t.dim() else 1
    row = t.nbytes // max(1, length)
    counts, places = _runs_of(tuple(rows) or (length // size,) * size, row)
    return [memory(t)[0], counts, places, MPI.BYTE]


@lru_cache(maxsize=1024)
def _runs_of(rows: tuple[int, ...], row: int) -> tuple[list[int], list[int]]:
    """Bytes for each rank, and where they begin; nobody writes to the lists, which are given again."""
    counts = [n * row for n in rows]
    return counts, [0, *itertools.accumulate(counts[:-1])]


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


def receive(peers: Peers, t: Tensor, source: int, tag: int) -> Steps:
    twin = peers.wire.lend(t, read=False, strided=True)
    yield peers.comm.Irecv(peers.wire.message(twin), source, tag)
    peers.wire.land(twin, t)


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
