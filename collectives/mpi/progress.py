"""The engine of this process: one thread that moves asynchronous operations on, and the end of the program.

MPI makes progress only inside MPI calls. A blocking call makes its own; an asynchronous one is
adopted here, so that it advances while the caller computes. The thread polls in naps and sleeps
when there is nothing to do.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
import weakref
from collections import deque
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from ..errors import BackendUnavailable, PeerLost
from . import failure
from .operation import Operation
from .rollcall import PATIENCE_S, Answer, RollCall
from .swap import compile_kernels
from .wire import Wire

if TYPE_CHECKING:
    from .member import Member

IDLE_S = 0.1  # between looks at the roll call when nothing is under way
NAP_S = 100e-6
# After the last operation the thread naps on for a while before it sleeps: a busy program need not wake it each time.
WARM_NAP_S = 2e-3
WARM_NAPS = 20
FAREWELL_S = 2.0
SILENCE_S = 5.0  # of a rank that lives: it may compile, or hold the interpreter


class Engine:
    """Shared by all groups of one process.

    Attributes:
        turn: held around MPI calls. MPI_THREAD_MULTIPLE needs no turns and gets a lock that never
            waits; under MPI_THREAD_SERIALIZED all calls go one at a time.

    State: operations under way, and what a lost peer left behind.
    """

    def __init__(self) -> None:
        level = MPI.Query_thread()
        if level < MPI.THREAD_SERIALIZED:
            raise BackendUnavailable(
                "backend 'mpi' needs MPI_THREAD_MULTIPLE or _SERIALIZED, but this MPI was started with less; "
                "start it with mpi4py.rc.thread_level = 'multiple' (mpi4py's default)"
            )
        self.serial = level < MPI.THREAD_MULTIPLE
        self.turn: Any = RLock() if self.serial else contextlib.nullcontext()
        compile_kernels()
        self.wire = Wire()
        self.world = MPI.COMM_WORLD.Dup()
        self.meeting = MPI.COMM_WORLD.Dup()
        self.groups: weakref.WeakValueDictionary[str, Member] = weakref.WeakValueDictionary()
        self.abandoned: list[Any] = []
        self.bereaved = False  # a fault-tolerant MPI has told of a death
        own = self.turn if self.serial else RLock()
        self.rollcall = RollCall(MPI.COMM_WORLD.Dup(), own, self._state_of)
        self._under_way: deque[Operation] = deque()
        self._work, self._stop = Event(), Event()
        self._thread = Thread(target=self._run, name="plait-mpi-progress", daemon=True)
        self._thread.start()
        self._process = os.getpid()
        atexit.register(self._end)

    def check_process(self) -> None:
        """Refuse to work in a fork of the process that started MPI, where no thread moves anything on."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"MPI was started by process {self._process}, of which this one is a fork: it is no rank, and cannot "
                "open groups. Open them in the rank itself, or start processes by 'spawn'"
            )

    def adopt(self, operation: Operation) -> None:
        """Move this operation on until it has ended, and keep its tensors alive until then."""
        operation.started = time.monotonic()
        self._under_way.append(operation)
        if not self._work.is_set():
            self._work.set()

    def _run(self) -> None:
        warm = 0
        while not self._stop.is_set():
            if not self._under_way and warm == 0:
                self._work.clear()
                self.rollcall.attend()
                if not self._under_way:
                    self._work.wait(IDLE_S)
            self._round()
            warm = WARM_NAPS if self._under_way else max(0, warm - 1)
            time.sleep(NAP_S if self._under_way else WARM_NAP_S)

    def _round(self) -> None:
        now = time.monotonic()
        if int(now / IDLE_S) != int((now - NAP_S) / IDLE_S):
            self.rollcall.attend()
        for _ in range(len(self._under_way)):
            operation = self._under_way[0]  # where `close` finds it meanwhile
            if operation.poll():
                self._under_way.popleft()
                continue
            self._under_way.rotate(-1)
            late = now - operation.started > operation.group.timeout_s
            # a message may be expected long before it is due: only its waiter knows when it is late
            if operation.peer is None and (late or self.rollcall.left):
                self.give_up(operation, late, operation.group.timeout_s)

    def give_up(self, operation: Operation, late: bool, patience_s: float) -> None:
        """End an operation that is late, or waits for a rank that has left."""
        group, ranks = operation.group, self._waited_for(operation)
        left = self.rollcall.left
        if not late and (left.keys().isdisjoint(ranks) or self._arrives(operation)):
            return
        answers = self.rollcall.ask(group.group_name, ranks, min(PATIENCE_S, patience_s / 2))
        call = operation.call if operation.peer is None else None
        doing = str(operation)
        where = [failure.where(r, answers.get(r), left.get(r), call, doing) for r in ranks]
        ended = f"did not end within {patience_s:g} s" if late else "cannot end"
        why = "; ".join(filter(None, where)) or "all ranks wait in it"
        error = PeerLost(f"{operation} on {group} {ended}: {why}")
        if operation.fail(error):
            group.lost = group.lost or error

    def close(self, group: Member, error: Exception) -> bool:
        """Give what a group has under way a moment, then end it; say whether all of it ended by itself."""
        end = time.monotonic() + FAREWELL_S
        mine = [operation for operation in list(self._under_way) if operation.group is group]
        while (mine := [op for op in mine if not op.poll()]) and time.monotonic() < end:
            time.sleep(NAP_S)
        failed = [operation.fail(error) for operation in mine]  # all of them
        return not any(failed)

    def misses_someone(self, operation: Operation) -> bool:
        """Say whether a rank that an operation waits for has fallen silent: it is dead or stopped, not late."""
        ranks = self._waited_for(operation)
        return len(self.rollcall.ask(operation.group.group_name, ranks, SILENCE_S)) < len(ranks)

    def _waited_for(self, operation: Operation) -> list[int]:
        group, peer = operation.group, operation.peer
        asked = group.ranks if peer is None or peer < 0 else [group.ranks[peer]]
        return [r for r in asked if r != self.world.rank]

    def _arrives(self, operation: Operation) -> bool:
        """What a rank sent before it left may still come: give it a moment."""
        end = time.monotonic() + PATIENCE_S / 2
        while time.monotonic() < end and not operation.poll():
            time.sleep(NAP_S)
        return operation.done

    def explain(self, operation: Operation, error: Exception) -> Exception:
        """Turn what MPI raises into what the person can use."""
        if not isinstance(error, MPI.Exception):
            return error
        group = operation.group
        self.abandoned.append(operation.remains())
        if error.Get_error_class() not in failure.LOST:
            hint = "do all ranks call it with the same sizes?"
            return RuntimeError(
                f"{operation} on {group} failed in MPI: {error.Get_error_string()}; {hint}"
            )
        self.bereaved = True
        failed = self.world.Get_failed()
        dead = MPI.Group.Translate_ranks(failed, range(failed.size), self.world.Get_group())
        group.lost = PeerLost(
            f"{operation} on {group} cannot end: rank {', '.join(map(str, dead))} is dead"
        )
        return group.lost

    def _state_of(self, name: str) -> Answer:
        group = self.groups.get(name)
        return {"calls": 0, "doing": "", "done": True} if group is None else group.state()

    def _end(self) -> None:
        """Leave in order: MPI cannot be finalised while a peer is lost, only aborted.

        A fault-tolerant mpirun cannot be told to abort either: two ranks that ask for it at once leave Open MPI's
        hanging. It ends by itself when all ranks are gone.
        """
        if os.getpid() != self._process:
            return
        lost = (g.lost for g in self.groups.values() if isinstance(g.lost, PeerLost))
        failed = getattr(sys, "last_value", None) or next(lost, None)
        if failed is not None:  # who still waits for this rank gives up now, and says why
            self.rollcall.leave(f"{type(failed).__name__}: {failed}".removesuffix(": "))
            self.abandoned.extend(self._under_way)
        self._stop.set()
        self._work.set()
        self._thread.join(1.0)
        if self.abandoned and not self._farewell(patient=failed is None):
            print(
                f"rank {self.world.rank}: a peer is lost, or its part of a call: the job is ended",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
            if self.bereaved:
                os._exit(1)
            MPI.COMM_WORLD.Abort(1)

    def _farewell(self, patient: bool) -> bool:
        """Give the others time to raise and to come; if all do, a late one included, MPI ends as usual.

        Where nothing has failed they may have much to do still: `patient`, it waits for them while all answer.
        """
        try:
            request = self.world.Ibarrier()
            while not self._all_come(request, FAREWELL_S):
                if not (patient and self._all_answer()):
                    return self._all_come(request, 0.0)  # who has come and gone answers no more
            return True
        except MPI.Exception:  # the dead come to no barrier; tested again it would pass for done
            return self._all_come(None, FAREWELL_S)

    def _all_come(self, request: MPI.Request | None, seconds: float) -> bool:
        """Answer the others for a while; say whether all have come to the barrier."""
        end = time.monotonic() + seconds
        while request is None or not request.Test():
            if time.monotonic() > end:
                return False
            self.rollcall.attend()
            time.sleep(0.01)
        return True

    def _all_answer(self) -> bool:
        """Say whether every other rank lives, and none has left with an error."""
        others = [r for r in range(self.world.size) if r != self.world.rank]
        answers = self.rollcall.ask("", others, SILENCE_S)
        return len(answers) == len(others) and not self.rollcall.left
