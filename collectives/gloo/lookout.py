"""One thread that looks after all groups of this process: who waits long, and whose peer is stopped."""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ledger import Ledger

ROUND_S = 0.25


class Lookout:
    """Rounds of four a second over the groups that are alive."""

    def __init__(self) -> None:
        self.ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()
        self._told = ""
        self._kept: list[object] = []
        Thread(target=self._run, name="plait-gloo", daemon=True).start()
        atexit.register(self._end)

    def _run(self) -> None:
        while True:
            time.sleep(ROUND_S)
            self._look(list(self.ledgers))

    def _look(self, ledgers: list[Ledger]) -> None:
        """Tell the other ranks of this process' oldest slow call, and give up ranks that stay stopped."""
        slow = [
            (call.since, ledger.where(call)) for ledger in ledgers for call in ledger.slow_calls()
        ]
        where = min(slow)[1] if slow else ""
        if where != self._told and ledgers:
            self._told = where
            ledgers[0].members.say_where(where)
        for ledger in ledgers:
            ledger.give_up_the_stopped()

    def orphan(self, ledger: Ledger, gloo: object) -> None:
        """In a fork: forget a group, but keep gloo's, whose end would wait for threads that are not here."""
        self.ledgers.discard(ledger)
        self._kept.append(gloo)

    def _end(self) -> None:
        """Where this process ends with an error, say so: others may wait for it."""
        error = getattr(sys, "last_value", None)
        reason = f"{type(error).__name__}: {error}".removesuffix(": ") if error else ""
        for ledger in list(self.ledgers):
            if error is None:
                ledger.flush()
            if error is not None or ledger.has_left_open():
                ledger.leave(reason)


@cache
def lookout() -> Lookout:
    """Return this process' lookout, made with its first group."""
    return Lookout()
