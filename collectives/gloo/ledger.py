"""The calls of a group that are under way, and how they end when a rank is lost."""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from threading import Lock
from typing import Any

import torch

from ..errors import PeerLost, anew
from . import deputy
from .call import LOST, Call
from .members import Members

STOPPED_S = 30.0  # a process that is stopped (SIGSTOP) is given up after this, whatever the timeout
SLOW_S = 1.0  # a call that takes longer is told to the others, who may be elsewhere
LINGER_S = 5.0  # ranks that waited for each other give up one after the other, and read where the others were
FLUSH_S = 2.0  # for a message that nobody waits for, when its group is closed
LOOK_S = 0.005
OTHER_DTYPES = (
    "it knows float32, float64, bfloat16, float16, int8, uint8, int32, int64 and bool; convert the tensor, or, to move "
    "it and not to sum it, use backend 'shm' or 'mpi'"
)
END_TAG = 0x7E4D  # of a message that is never sent, see `_end_all`


class Ledger:
    """What a group has begun. A group that has lost a rank is over: what is under way ends, on the other ranks too.

    Attributes:
        timeout_s: how long a call is waited for.
        lost: the error that ended the group; every later call raises it.

    State: the calls under way.
    """

    def __init__(self, gloo: Any, members: Members, name: str, timeout_s: float) -> None:
        self.gloo, self.members, self.name, self.timeout_s = gloo, members, name, timeout_s
        self.lost: Exception | None = None
        # weak: who drops the work of a receive waits for it no more
        self._under_way: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
        self._left_open: list[Call] = []  # that nobody waits for since an interruption
        self._dropped: list[deputy.Said] = []  # what came of sends whose work nobody has
        self._ending = Lock()
        self._lost_call: Call | None = None
        self._lost_at = 0.0

    def start(self, call: Call, begin: Callable[[], Any]) -> Call:
        """Begin a call."""
        if self.lost is not None:
            raise anew(self.lost)
        self._under_way[id(call)] = call
        try:
            call.inner = begin()
        except RuntimeError as error:
            raise self.explain(call, error) from error
        return call

    def under_way(self) -> list[Call]:
        """Give the calls that have not ended, as far as is known."""
        return list(self._under_way.values())

    def forget(self, call: Call) -> None:
        """Take note that a call has ended."""
        self._under_way.pop(id(call), None)

    def leave_open(self, call: Call) -> None:
        """Take note that nobody waits for a call any more, which goes on."""
        self._left_open.append(call)

    def deliver(self, inner: Any) -> None:
        """See to it that a message arrives, for nobody waits for it."""
        if self.lost is None and not sys.is_finalizing():
            going = [said for said in self._dropped if said.empty()]
            # for long: a wait that ends early closes all of the group's connections
            self._dropped = [*going, deputy.ask(lambda: inner.wait(timedelta(days=100)))]

    def flush(self) -> None:
        """Give what nobody waits for a moment to arrive."""
        until = time.monotonic() + FLUSH_S
        while any(said.empty() for said in self._dropped) and time.monotonic() < until:
            time.sleep(LOOK_S)

    def has_left_open(self) -> bool:
        """Say whether a call that nobody waits for goes on still."""
        self._left_open = [call for call in self._left_open if not call.is_completed()]
        return bool(self._left_open) or any(said.empty() for said in self._dropped)

    def where(self, call: Call) -> str:
        """Say of a call where this rank is."""
        number = f"call {call.number}, " if call.peer is None else ""
        return f"{number}{call} in group {self.name}"

    def slow_calls(self) -> list[Call]:
        """Give the collectives that take long."""
        for call in self.under_way():
            ended = call.peer is None and call.inner is not None and call.is_completed()
            if ended and not call.has_failed():  # of which others are told until it is explained
                self.forget(call)
        now = time.monotonic()
        if self._lost_call is not None and now < self._lost_at + LINGER_S:
            return [self._lost_call]
        begun = now - min(SLOW_S, self.timeout_s / 4)
        return [call for call in self.under_way() if call.peer is None and call.since < begun]

    # ---- when something is lost

    def explain(self, call: Call, error: Exception) -> Exception:
        """Turn what gloo raised into what the person can use, and end what else is under way after a loss."""
        try:
            return self._explained(call, error)
        finally:
            self.forget(call)

    def _explained(self, call: Call, error: Exception) -> Exception:
        text = str(error)
        if text.startswith("Invalid scalar type"):
            return ValueError(f"gloo cannot do {call} in group {self.name}: {OTHER_DTYPES}")
        if self.lost is None and not LOST.search(text):
            return error
        with self._ending:
            if self.lost is None:
                late = "imed out" in text
                self._lose(call, late, self.timeout_s)
        assert self.lost is not None
        return anew(self.lost)

    def give_up_the_stopped(self) -> None:
        """End the calls that have long waited for a process that is stopped."""
        begun = time.monotonic() - STOPPED_S
        waiting = [call for call in self.under_way() if call.since < begun]
        stopped = self.members.stopped() if waiting and self.lost is None else []
        for call in waiting:
            if stopped and (call.peer is None or call.peer in stopped):
                with self._ending:
                    if self.lost is None:
                        self._lose(call, True, STOPPED_S)

    def _lose(self, call: Call, late: bool, patience_s: float) -> None:
        peers = self.members.others if call.peer is None or call.peer < 0 else [call.peer]
        why = self.members.why(self.where(call), late, peers) or "a rank closed its connection"
        within = f" within {patience_s:g} s" if late else ""
        self.lost = PeerLost(f"{call} in group {self.name} did not end{within}: {why}")
        self._lost_call, self._lost_at = call, time.monotonic()
        self.members.say_lost(f"{call}: {why}")
        self._end_all()

    def _end_all(self) -> None:
        """Close gloo's connections, so that nothing waits any more, here and on the other ranks.

        It has no call for that, but closes all of a group's connections when a message does not come in time.
        """
        for other in self.members.others:  # one connection would do that is not closed yet
            with contextlib.suppress(RuntimeError):
                message = self.gloo.recv([torch.empty(1)], other, END_TAG)
                message.wait(timedelta(milliseconds=1))

    def leave(self, reason: str) -> None:
        """Tell the others that this process ends with an error, and let none of them wait for it."""
        self.members.say_farewell(reason)
        self._end_all()

    def close(self) -> None:
        """End what nobody waits for any more, and refuse every later call."""
        if self.lost is None:
            self.flush()
        if self.has_left_open():
            self._end_all()  # or the process could not end before its timeout
        self.refuse(RuntimeError(f"group {self.name} is closed"))

    def refuse(self, error: Exception) -> None:
        """Raise this error from every later call, unless the group has ended by another."""
        self.lost = self.lost or error
