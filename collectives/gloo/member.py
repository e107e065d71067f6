"""`Member`: this rank in a group over gloo: who it is, and how its calls run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ..errors import CallMismatch, PeerLost
from ..python_group import PythonGroup
from ..shown_call import Moved, ShownCall, is_on, mismatch, room_of
from ..trace import listening, tell_traces
from ..work import Finished
from .call import Call, Sending
from .ledger import Ledger
from .lookout import lookout
from .members import Members
from .sockets import Sockets

_GATHER = AllgatherOptions()


class Member(PythonGroup):
    """A group of ranks over gloo, without its collectives.

    A group that has lost a rank is over: what is under way ends, on the other ranks too, and later calls raise at once.

    State: gloo's connections, and the calls under way.
    """

    def __init__(
        self, store: Any, rank: int, names: Sequence[int], timeout: timedelta, name: str
    ) -> None:
        super().__init__(rank, len(names))
        self._name, self._description = name, ""
        self.members = Members(store, rank, names, timeout, name)
        self._sockets = Sockets()
        try:
            with self._sockets.opened_here():
                self._gloo: Any = dist.ProcessGroupGloo(store, rank, len(names), timeout)
        except RuntimeError as error:
            why = self.members.why("", True, self.members.others)
            raise PeerLost(f"group {name} cannot open: {why} ({error})") from error
        self._calls = 0
        self._ledger = Ledger(self._gloo, self.members, name, timeout.total_seconds())
        lookout().ledgers.add(self._ledger)

    # ---- who it is: c10d cannot know it of a group written in Python

    def rank(self) -> int:
        return self.members.rank

    def size(self) -> int:
        return len(self.members.names)

    def getBackendName(self) -> str:
        return "plait_gloo"

    name = _get_backend_name = getBackendName

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device("cuda")]

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: calls are counted anyway."""

    def _get_sequence_number_for_group(self) -> int:
        return self._calls

    def set_timeout(self, timeout: timedelta) -> None:
        self._ledger.timeout_s = timeout.total_seconds()
        self._gloo.set_timeout(timeout)

    _set_default_timeout = set_timeout

    # ---- running

    def _run(
        self,
        kind: str,
        start: Callable[[], Any],
        brought: Sequence[Tensor],
        opts: Any = None,
        moved: Moved = ([], []),
        given: Sequence[Tensor] | None = None,
        last: Callable[[], list[Tensor]] | None = None,
    ) -> dist.Work:
        """Start a collective, and wait for it unless the caller does.

        Args:
            brought: what this rank gives; for a scatter what it gets, which every rank knows.
            given: what it gives then.
            last: what is to be done when gloo's part is over; gives the outputs.
        """
        begin = time.perf_counter() if listening() else None
        if is_on():
            self._compare(ShownCall.of(kind, brought, opts, *moved))
        self._calls += 1
        call = Call(self._ledger, kind, brought, self._calls, last=last)
        work = self._ledger.start(call, start)
        waits = opts is not None and not opts.asyncOp
        if waits:
            work.wait()
            work = Finished()
        if begin is not None:
            kept = moved[0][self.rank()] / max(sum(moved[0]), 1) if any(moved[0]) else None
            seconds = time.perf_counter() - begin
            kept = kept if kind == "all_to_all" else None
            root, given = getattr(opts, "rootRank", None), brought if given is None else given
            tell_traces(self, kind, given, seconds, None if waits else work, kept, root)
        return work

    def _message(self, kind: str, start: Callable[[], Any], x: Tensor, peer: int) -> Call:
        begin = time.perf_counter() if listening() else None
        name = f"rank {self.members.names[peer]}" if peer >= 0 else "any rank"
        what, place = ("send", "to") if kind == "send" else ("receive", "from")
        work = Sending if kind == "send" else Call
        call = work(self._ledger, what, [x], 0, peer, f" {place} {name}")
        self._ledger.start(call, start)
        if begin is not None:
            tell_traces(self, kind, [x], time.perf_counter() - begin, call)
        return call

    def _compare(self, shown: ShownCall) -> None:
        """In debug mode: show a collective to all other ranks before it starts, and look at theirs.

        Raises:
            CallMismatch: two ranks are in different calls; the same on every rank.
        """
        room = room_of(self.size())
        own = torch.frombuffer(bytearray(shown.packed(room)), dtype=torch.uint8)
        found = own.new_empty(self.size() * room)
        call = Call(self._ledger, f"{shown}, before it,", [], self._calls + 1)
        self._ledger.start(call, lambda: self._gloo._allgather_base(found, own, _GATHER)).wait()
        calls = [ShownCall.unpacked(bytes(text.tolist())) for text in found.view(-1, room)]
        if why := mismatch(calls, self.members.names):
            raise CallMismatch(f"ranks of group {self._name} made different calls: {why}")

    def orphan(self, error: RuntimeError) -> None:
        self._ledger.lost = error
        self._sockets.let_go()
        lookout().orphan(self._ledger, self._gloo)

    def shutdown(self) -> None:
        """Leave the group."""
        lookout().ledgers.discard(self._ledger)
        self._ledger.close()
        self.members.close()

    abort = shutdown
