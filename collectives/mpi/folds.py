"""Reductions, built from exchanges and local folds.

MPI's non-blocking all-reduce is several times slower than its blocking one from 1 MB up (Open MPI, measured in
docs/decisions/011-mpi-backend.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from mpi4py import MPI
from torch import Tensor

from .peers import Peers, Steps
from .reduction import Reduction
from .scratch import Room
from .wire import Run, elements_of, memory, span

# Up to this many gathered bytes everyone sends all to all and reduces alone: one step.
ONE_SHOT_BYTES = 512 * 1024
SEGMENT_BYTES = 1 << 20  # of what is folded at once


def all_reduce(peers: Peers, t: Tensor, by: Reduction, spins: int = 0) -> Steps:
    twin = peers.wire.lend(t, read=True)
    if peers.size == 1:
        return
    tag, n = peers.tag(), twin.nbytes
    if peers.size * n > ONE_SHOT_BYTES:
        runs = _runs(twin, peers.size)
        own = elements_of(twin, runs[peers.rank])
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
    twin = peers.wire.lend(t, read=True)
    if peers.size == 1:
        return
    tag = peers.tag()
    runs = _runs(twin, peers.size)
    own = elements_of(twin, runs[peers.rank])
    part = own if peers.rank == root else torch.empty_like(own)
    yield from _reduce_to(peers, part, own, runs, by, tag)
    if peers.rank != root:
        yield peers.inner.Isend(memory(part), root, tag)
        return
    yield [peers.inner.Irecv(span(*runs[r]), r, tag) for r in peers.others]
    peers.wire.land(twin, t)


def reduce_scatter(peers: Peers, out: Tensor, inputs: Sequence[Tensor], by: Reduction) -> Steps:
    brought = [peers.wire.lend(t, read=True) for t in inputs]
    twin = peers.wire.lend(out, read=False)
    if peers.size == 1:
        peers.wire.land(brought[0], out)
        return
    tag = peers.tag()
    brought = [b if r == peers.rank else peers.wire.apart(b, twin) for r, b in enumerate(brought)]
    own = brought[peers.rank].view(twin.shape)
    yield from _reduce_to(peers, twin, own, [(b.data_ptr(), b.nbytes) for b in brought], by, tag)
    peers.wire.land(twin, out)


def reduce_scatter_single(
    peers: Peers, out: Tensor, t: Tensor, by: Reduction, spins: int = 0
) -> Steps:
    """The same for parts that lie end to end."""
    brought, twin = peers.wire.lend(t, read=True), peers.wire.lend(out, read=False)
    address, n = brought.data_ptr(), twin.nbytes
    if twin.data_ptr() != address + peers.rank * n:
        brought = peers.wire.apart(brought, twin)
        address = brought.data_ptr()
    if peers.size == 1:
        peers.wire.land(brought.view(out.shape), out)
        return
    tag = peers.tag()
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
