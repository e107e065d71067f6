"""Collectives that move what they are given: broadcasts, gathers, scatters, exchanges, and sends."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

from torch import Tensor

from .peers import Peers, Steps
from .swap import MOST_BYTES, in_pieces
from .wire import Message, Run, elements_of, memory, span


def broadcast(peers: Peers, t: Tensor, root: int) -> Steps:
    twin = peers.wire.lend(t, read=peers.rank == root)
    yield peers.comm.Ibcast(memory(twin), root)
    if peers.rank != root:
        peers.wire.land(twin, t)


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
        elements_of(to, (home, n)).copy_(elements_of(own, (place, n)))
    yield requests


def _messages(address: int, n: int) -> list[Message]:
    """As the kernel cuts it: ranks may differ in which of the two they need."""
    piece = in_pieces(n)
    return [span(address + at, min(piece, n - at)) for at in range(0, max(1, n), max(1, piece))]


def all_gather(peers: Peers, outputs: Sequence[Tensor], t: Tensor) -> Steps:
    """Gather into tensors that may differ in size and lie anywhere."""
    wire = peers.wire
    own = wire.lend(t, read=True, strided=True)
    twins = [wire.lend(out, read=False, strided=True) for out in outputs]
    message, tag = wire.message(own), peers.tag()
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
    wire = peers.wire
    own = [wire.lend(t, read=True, strided=True) for t in inputs]
    twins = [wire.lend(out, read=False, strided=True) for out in outputs]
    tag = peers.tag()
    requests = [peers.inner.Irecv(wire.message(twins[r]), r, tag) for r in peers.others]
    requests += [peers.inner.Isend(wire.message(own[r]), r, tag) for r in peers.others]
    twins[peers.rank].copy_(own[peers.rank])
    yield requests
    for twin, out in zip(twins, outputs, strict=True):
        wire.land(twin, out)


def gather(peers: Peers, outputs: Sequence[Tensor], t: Tensor, root: int) -> Steps:
    wire, is_root = peers.wire, peers.rank == root
    own = wire.lend(t, read=True, strided=True)
    twins = [wire.lend(out, read=False, strided=True) for out in outputs if is_root]
    tag = peers.tag()
    if not is_root:
        yield peers.inner.Isend(wire.message(own), root, tag)
        return
    requests = [peers.inner.Irecv(wire.message(twins[r]), r, tag) for r in peers.others]
    twins[root].copy_(own)
    yield requests
    for twin, out in zip(twins, outputs, strict=True):
        wire.land(twin, out)


def scatter(peers: Peers, out: Tensor, inputs: Sequence[Tensor], root: int) -> Steps:
    wire, is_root = peers.wire, peers.rank == root
    twin = wire.lend(out, read=False, strided=True)
    own = [wire.lend(t, read=True, strided=True) for t in inputs if is_root]
    tag = peers.tag()
    if not is_root:
        yield peers.inner.Irecv(wire.message(twin), root, tag)
    else:
        twin.copy_(own[root])
        yield [peers.inner.Isend(wire.message(own[r]), r, tag) for r in peers.others]
    wire.land(twin, out)


def send(peers: Peers, t: Tensor, to: int, tag: int) -> Steps:
    own = peers.wire.lend(t, read=True, strided=True)
    yield peers.comm.Isend(peers.wire.message(own), to, tag)
