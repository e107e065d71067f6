"""`Member`: this rank in a group over MPI: who it is, and how its calls run."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from ..errors import PeerLost, anew
from ..python_group import PythonGroup
from ..shown_call import Moved, ShownCall, is_on
from ..trace import listening, tell_traces
from ..work import Finished
from . import check, failure
from .operation import About, Operation, OperationWork
from .peers import Peers, Steps, complete, meet, tag_of
from .progress import Engine
from .rollcall import Answer

SPINS = 200  # tests of a request before a blocking call lets other threads and ranks go first
_TRACED = {  # how a trace calls them
    "all_gather_into_tensor": "all_gather",
    "all_reduce_coalesced": "all_reduce",
    "all_to_all_single": "all_to_all",
}


@cache
def engine() -> Engine:
    """Return this process' engine, made with its first group."""
    return Engine()


class Member(PythonGroup):
    """A group of ranks, without its collectives.

    A call with `asyncOp=False` runs to its end in the calling thread; any other returns a `Work`
    which the progress thread moves on, and so does whoever waits for it.

    Attributes:
        cuda: how CUDA tensors travel: "direct", or "staged" through pinned memory.
        lost: the error that ended this group; every later call raises it.

    State: owns its two communicators until `shutdown`.
    """

    def __init__(self, ranks: Sequence[int], timeout: timedelta, name: str, backend: str) -> None:
        self.engine = engine()
        self.engine.check_process()
        self.ranks = list(ranks)
        self._rank = self.ranks.index(self.engine.world.rank)
        super().__init__(self._rank, len(self.ranks))
        self.timeout_s = timeout.total_seconds()
        self.calls = 0
        self.lost: Exception | None = None
        self.cuda = self.engine.wire.cuda
        self._name, self._backend, self._description = name, backend, ""
        self._last: About = ("", None, None)
        self._open: bool | weakref.ref[Operation] = False  # is the last call still under way?
        self.shows_calls = is_on()
        self._finished = Finished()
        self._coalescing: list[dist.Work] | None = None
        self.engine.groups[name] = self
        self.peers = self._connect()

    def _connect(self) -> Peers:
        """Make the communicators; only members take part.

        MPI makes them in calls that cannot be given up, so all members meet first.
        """
        meeting = meet(self.engine.meeting, self.ranks, self._name)
        self._run_here(("new_group", None, None), [], meeting)
        with self.engine.turn:
            members = self.engine.world.Get_group().Incl(self.ranks)
            comm = self.engine.world.Create_group(members, tag_of(self._name))
            members.Free()
            return Peers(comm, comm.Dup(), self.engine.wire, self._rank, len(self.ranks))

    # ---- who we are: c10d cannot know it of a group written in Python

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:
        return self._backend

    def _set_group_name(self, name: str) -> None:
        self.engine.groups.pop(self._name, None)
        self._name = name
        self.engine.groups[name] = self

    @property
    def _device_types(self) -> list[torch.device]:  # type: ignore[override]
        return [torch.device("cpu"), torch.device("cuda")]

    def __str__(self) -> str:
        return f"group {self._name!r}"

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def orphan(self, error: RuntimeError) -> None:
        self.lost = error

    def shutdown(self) -> None:
        """Free the communicators.

        Collective: all members. Nothing is freed after a loss, or where something is under way that does not end:
        MPI would wait for it.
        """
        if self.lost is None and not MPI.Is_finalized():
            self.abort()
            assert self.lost is not None
            if self.engine.close(self, self.lost):
                with self.engine.turn:
                    self.peers.comm.Free()
                    self.peers.inner.Free()

    def abort(self) -> None:
        """Refuse every further call; frees nothing, so it waits for nobody."""
        self.lost = self.lost or RuntimeError(f"{self} is closed")

    # ---- running

    def _run(
        self,
        name: str,
        tensors: list[Tensor],
        steps: Steps,
        opts: Any = None,
        peer: int | None = None,
        brought: Sequence[Tensor] | None = None,
        moved: Moved = ([], []),
    ) -> dist.Work:
        """Start or do a call that fills `tensors`; `brought` is what this rank gives, where that is not the same."""
        if self.lost is not None:
            raise anew(self.lost)
        begin = time.perf_counter() if listening() else None
        if self.shows_calls and peer is None:
            call = ShownCall.of(name, tensors, opts, *moved)
            compare = check.compare(self.peers, self.ranks, call, str(self))
            self._run_here((f"{call}, before it,", None, None), [], compare)
        about: About = (name, tensors[0].shape, tensors[0].dtype) if tensors else (name, None, None)
        before = self.calls, self._last
        if peer is None:
            self.calls += 1
            self._last = about
        try:
            if opts is None or opts.asyncOp or self._coalescing is not None:
                work = self._run_aside(Operation(self, about, tensors, steps, peer))
            else:
                self._open = True
                self._run_here(about, tensors, steps)
                self._open = False
                work = self._finished
        except (TypeError, ValueError):  # refused: this rank has taken no part
            if peer is None:
                (self.calls, self._last), self._open = before, False
            raise
        if begin is not None:
            root = getattr(opts, "rootRank", None)
            self._tell(name, tensors if brought is None else brought, begin, work, moved[0], root)
        return work

    def _tell(
        self,
        name: str,
        brought: Sequence[Tensor],
        begin: float,
        work: dist.Work,
        sent: list[int],
        root: int | None,
    ) -> None:
        under_way = None if work is self._finished else work
        kind, seconds = _TRACED.get(name, name), time.perf_counter() - begin
        kept = sent[self._rank] / sum(sent) if kind == "all_to_all" and any(sent) else None
        tell_traces(self, kind, brought, seconds, under_way, kept, root)

    def _run_aside(self, operation: Operation) -> dist.Work:
        if operation.peer is None:
            self._open = weakref.ref(operation)
        operation.start()
        if not operation.done:
            self.engine.adopt(operation)
        work = OperationWork(operation)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _run_here(self, about: About, tensors: list[Tensor], steps: Steps) -> None:
        """Run to the end in this thread; what takes longer than a moment becomes an `Operation`."""
        requests: Any = None
        try:
            if not self.engine.serial:
                requests = next(steps, None)
                while requests is not None and any(map(complete, repeat(requests, SPINS))):
                    requests = None  # an interruption may come before the next ones have this name
                    requests = next(steps, None)
                if requests is None:
                    return
        except MPI.Exception as error:
            operation = Operation(self, about, tensors, steps)
            raise self.engine.explain(operation, error) from error
        except KeyboardInterrupt as interruption:
            operation = Operation(self, about, tensors, steps)
            operation.resume(requests)
            operation.interrupted(interruption)
            self._set_aside(operation)
            raise
        operation = Operation(self, about, tensors, steps)
        if self.engine.serial:
            operation.start()
        else:
            operation.resume(requests)
        try:
            operation.wait()
        except KeyboardInterrupt:
            self._set_aside(operation)
            raise

    def _set_aside(self, operation: Operation) -> None:
        """Let a call go on that nobody waits for any more: others do, and MPI knows its tensors."""
        self._open = weakref.ref(operation)
        if not operation.done:
            self.engine.adopt(operation)

    def state(self) -> Answer:
        """Say where this rank is in the calls of the group; the roll call asks."""
        under_way = self._open() if isinstance(self._open, weakref.ref) else None
        done = (
            not self._open if isinstance(self._open, bool) else under_way is None or under_way.done
        )
        gone = "" if self.lost is None or isinstance(self.lost, PeerLost) else str(self.lost)
        return {"calls": self.calls, "doing": failure.text(*self._last), "done": done, "gone": gone}
