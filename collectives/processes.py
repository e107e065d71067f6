"""The processes of other ranks, as this host sees them: alive, stopped by a signal, or ended."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Card = dict[str, Any]  # who a process is: {"host": str, "on": str, "pid": int, "born": str}


def own_card() -> Card:
    """Describe this process to the others."""
    pid = os.getpid()
    return {"host": host(), "on": socket.gethostname(), "pid": pid, "born": _born(pid)}


class Processes:
    """The processes behind some cards; of those on other hosts nothing is known.

    State: a handle on every other process of this host, by which its end is seen at once.
    """

    def __init__(self, cards: Sequence[Card]) -> None:
        """Open the handles.

        Raises:
            OSError: the system has no handles on processes.
        """
        self.cards = list(cards)
        here, self._files = host(), list[int]()
        self._handles: list[select.poll | None] = [None] * len(self.cards)
        self._local = [card["host"] == here for card in self.cards]
        self._gone = [False] * len(self.cards)
        try:
            for number, card in enumerate(self.cards):
                if self._local[number] and card["pid"] != os.getpid():
                    self._watch(number, card)
        except OSError:
            self.close()
            raise

    def _watch(self, number: int, card: Card) -> None:
        try:
            fd = os.pidfd_open(card["pid"])
        except ProcessLookupError:
            self._gone[number] = True
            return
        self._files.append(fd)
        self._gone[number] = _born(card["pid"]) != card["born"]  # another has its number now
        poll = self._handles[number] = select.poll()
        poll.register(fd, select.POLLIN)

    def ended(self, number: int) -> bool:
        """Say whether a process is known to have ended."""
        handle = self._handles[number]
        return self._gone[number] or (handle is not None and bool(handle.poll(0)))

    def stopped(self, number: int) -> bool:
        """Say whether a process is known to be stopped by a signal."""
        return self._local[number] and _stat(self.cards[number]["pid"])[:1] == ["T"]

    def close(self) -> None:
        """Let go of them; nothing is known any more."""
        self._handles = [None] * len(self.cards)
        for fd in self._files:
            os.close(fd)
        self._files = []


def host() -> str:
    """Identify this boot of this host and the processes that are seen on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return socket.gethostname()


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _born(pid: int) -> str:
    """When a process began: with its pid, this names it for ever."""
    stat = _stat(pid)
    return stat[19] if stat else ""
