"""Ask the other ranks where they are, so that an error can name who is missing.

Only asked after a timeout. Every rank answers from its progress thread, so a rank that is busy
elsewhere says what it is doing, and one that is dead or stopped is the one that says nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

from mpi4py import MPI

ASK, ANSWER, LEAVE = 1, 2, 3
PATIENCE_S = 1.0  # how long an answer may take

# {"calls": int, "doing": str, "done": bool, "gone": str} of one group; gone: why it is over, but for a lost rank
Answer = dict[str, Any]


class RollCall:
    """Questions and answers over a communicator of their own, the size of the world.

    State: the answers that came, by (group, rank), and the ranks that said they leave with an error.
    """

    def __init__(self, comm: MPI.Intracomm, turn: RLock, state_of: Callable[[str], Answer]) -> None:
        self.comm = comm
        self.left: dict[int, str] = {}
        self._turn = turn
        self._state_of = state_of
        self._answers: dict[tuple[str, int], Answer] = {}
        self._unsent: list[MPI.Request] = []

    def attend(self) -> None:
        """Read what has come, and answer; called by the progress thread and by whoever asks."""
        with self._turn:
            try:
                while self._read():
                    pass
                self._unsent = [request for request in self._unsent if not request.Test()]
            except MPI.Exception:
                # a fault-tolerant MPI refuses to receive from "any" until the dead are acknowledged
                self._unsent.clear()
                self.comm.Ack_failed()

    def _read(self) -> bool:
        status = MPI.Status()
        message = self.comm.Improbe(status=status)
        if message is None:
            return False
        text = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([text, MPI.BYTE])
        body = json.loads(text)
        if status.tag == ASK:
            group = body["group"]
            self._say(status.source, ANSWER, {"group": group, **self._state_of(group)})
        elif status.tag == ANSWER:
            self._answers[body["group"], status.source] = body
        else:
            self.left[status.source] = body["reason"]
        return True

    def ask(self, group: str, ranks: Sequence[int], patience_s: float) -> dict[int, Answer]:
        """Ask these ranks about a group; those that do not answer in time are not in the result."""
        for rank in ranks:
            self._answers.pop((group, rank), None)
            self._say(rank, ASK, {"group": group})
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            self.attend()
            if all((group, rank) in self._answers for rank in ranks):
                break
            time.sleep(0.002)
        return {r: self._answers[group, r] for r in ranks if (group, r) in self._answers}

    def leave(self, reason: str) -> None:
        """Tell everyone that this rank ends with an error."""
        for rank in range(self.comm.size):
            if rank != self.comm.rank:
                self._say(rank, LEAVE, {"reason": reason})

    def _say(self, rank: int, tag: int, body: Answer) -> None:
        with self._turn:
            try:
                text = json.dumps(body).encode()
                self._unsent.append(self.comm.Isend([text, MPI.BYTE], rank, tag))
            except MPI.Exception:  # a fault-tolerant MPI knows already that this rank is gone
                pass
