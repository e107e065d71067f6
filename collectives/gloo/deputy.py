"""Threads that wait in C++ for those who ask: Python sees no signal (Ctrl-C) in a thread that waits there."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any

Said = SimpleQueue[Exception | None]  # one word: what a wait raised


class Deputy:
    """A thread that waits, for one at a time."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Callable[[], Any], Said]] = SimpleQueue()
        Thread(target=self._run, name="plait-gloo-waits", daemon=True).start()

    def ask(self, wait: Callable[[], Any]) -> Said:
        """Have it wait; it may be asked again when it has said what came of that."""
        said: Said = SimpleQueue()
        self._asked.put((wait, said))
        return said

    def _run(self) -> None:
        while True:
            self._answer(*self._asked.get())

    def _answer(self, wait: Callable[[], Any], said: Said) -> None:
        error = None
        try:
            wait()
        except RuntimeError as raised:
            error = raised.with_traceback(None)  # whose frames would keep the group
        _idle().append(self)
        said.put(error)


def ask(wait: Callable[[], Any]) -> Said:
    """Have a thread wait; what the wait raised, or None, is then to be had from the queue."""
    try:
        deputy = _idle().pop()
    except IndexError:
        deputy = Deputy()
    return deputy.ask(wait)


@cache
def _idle() -> list[Deputy]:
    """The deputies of this process that have nothing to do."""
    deputies: list[Deputy] = []
    os.register_at_fork(after_in_child=deputies.clear)
    return deputies
