"""Receives of single messages: each looks at a message's length before it says where it goes.

A message that is longer than its receive is an error in MPI, but Open MPI (5.0.11, large messages between processes
of a host) first writes all of it, past the end of the tensor. So a receive takes its message by a matched probe, and
one of another length goes elsewhere. Receives that could take the same message stay in the order of their calls.
"""

from __future__ import annotations

from mpi4py import MPI
from torch import Tensor

from .peers import Peers, Steps
from .wire import Message


class Arrival:
    """A message that is waited for; stands for its request, which begins when the message is there.

    Attributes:
        sent: bytes of the message; -1 until it is there, and where MPI cannot count them.
    """

    def __init__(self, peers: Peers, message: Message, n_bytes: int, source: int, tag: int) -> None:
        self._peers, self._message, self._n_bytes = peers, message, n_bytes
        self.source, self.tag, self.sent = source, tag, -1
        self._request: MPI.Request | None = None
        peers.awaited.append(self)

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Look for the message, then for its end, as a request's Test does."""
        if self._request is None and not self._begin():
            return False
        assert self._request is not None
        return self._request.Test(status)

    def _begin(self) -> bool:
        """Take the message if it is there and nobody called for it before."""
        status, source = MPI.Status(), self.source
        if source == MPI.ANY_SOURCE:
            if not self._peers.comm.Iprobe(source, self.tag, status):
                return False
            source = status.source
        for earlier in self._peers.awaited:
            if earlier is self:
                break
            if earlier.tag == self.tag and earlier.source in (source, MPI.ANY_SOURCE):
                earlier._begin()
                return False  # at the next look, if there is one for both
        found = self._peers.comm.Improbe(source, self.tag, status)
        if found is None:
            return False
        self._peers.awaited.remove(self)
        self.sent = status.Get_elements(MPI.BYTE)
        if self.sent >= 0 and self.sent != self._n_bytes:
            self._message = [bytearray(self.sent), self.sent, MPI.BYTE]
        self._request = found.Irecv(self._message)
        return True


def receive(peers: Peers, t: Tensor, source: int, tag: int) -> Steps:
    """Receive a message.

    Raises:
        ValueError: it is not as long as the tensor; it is dropped.
    """
    twin = peers.wire.lend(t, read=False, strided=True)
    arrival = Arrival(peers, peers.wire.message(twin), twin.nbytes, source, tag)
    yield arrival
    if arrival.sent not in (-1, twin.nbytes):
        dtype = str(t.dtype).removeprefix("torch.")
        raise ValueError(
            f"a message of {arrival.sent} bytes came with tag {tag}, but the receive is for {twin.nbytes} "
            f"({t.numel()} {dtype}); send and receive tensors of one size and dtype"
        )
    peers.wire.land(twin, t)
