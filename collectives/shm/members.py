"""The processes of a group: how they meet, and how one sees that another is gone."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, PeerLost
from ..processes import Processes, own_card
from .segment import Layout, Segment
from .single_copy import can_read

# What a rank notes for the others, in order; a word that only it writes.
ABSENT, MAPPED, OPEN, CLOSED, FAILED = range(5)
# what rank 0 may take, beyond the timeout, to compile kernels that are in no cache yet
COMPILE_S = 600.0
_FAILED_BASE = 1 << 8  # FAILED notes are this plus the rank that was lost, or plus 255


class Members:
    """The ranks of a group and the memory they share.

    Attributes:
        readable: whether every rank may read every other's own memory (see single_copy.py).

    State: the segment, and a handle on every other process by which its end is seen at once.
    """

    def __init__(
        self, store: Any, rank: int, names: list[int], timeout: timedelta, name: str
    ) -> None:
        self.rank, self.ranks, self.name = rank, len(names), name
        self._names = names  # of the ranks in the world
        self._probe = np.array([secrets.randbits(62)])  # for the others to read
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._store = store
        self.layout = Layout(self.ranks)
        check_platform()
        self._fd, problem = -1, ""
        if rank == 0:
            try:
                self.segment, self._fd = Segment.create(f"plait-{name}", self.layout.size)
            except OSError as error:
                problem = f"rank {names[0]} cannot have {self.layout.size} bytes for it: {error}"
        with ExitStack() as undo:
            if self._fd >= 0:
                undo.callback(os.close, self._fd)
            self.cards = self._exchange_cards(store, problem, timeout)
            self._processes, refusal = self._watch()
            undo.callback(self._processes.close)
            self._agree_on_mapping(refusal, timeout)
            undo.pop_all()

    def open(self, prepare: Callable[[], None]) -> None:
        """Wait until all ranks have mapped the segment. Rank 0 prepares first, alone; then the others do."""
        self.note(MAPPED)
        if self.rank:
            self._await(0, MAPPED)
            self._await(0, OPEN, COMPILE_S)
            prepare()
        else:
            for r in range(1, self.ranks):
                self._await(r, MAPPED)
            for r in range(self.ranks):  # all have read them; a group of this name may come again
                self._store.delete_key(self._key("card", r))
                self._store.delete_key(self._key("mapped", r))
            os.close(self._fd)
            prepare()
        self.note(OPEN)

    def _exchange_cards(self, store: Any, problem: str, timeout: timedelta) -> list[dict[str, Any]]:
        card = {**own_card(), "fd": self._fd, "problem": problem}
        card["at"], card["word"] = self._probe.ctypes.data, int(self._probe[0])
        store.set(self._key("card", self.rank), json.dumps(card))
        cards = [json.loads(text) for text in self._read_all("card", timeout)]
        hosts = [card["host"] for card in cards]
        if len(set(hosts)) > 1:
            places = [card["on"] for card in cards]
            raise BackendUnavailable(
                f"backend 'shm' is for ranks on one host (and in one pid namespace), but the ranks of group "
                f"{self.name} run on {places}; use backend 'gloo' for this group"
            )
        if why := cards[0]["problem"]:
            raise BackendUnavailable(self._refused(why))
        return cards

    def _agree_on_mapping(self, refusal: str, timeout: timedelta) -> None:
        """Map the segment, and try to read the others' memory; where one rank cannot, all are told the same."""
        reads = all(can_read(card["pid"], card["at"], card["word"]) for card in self.cards)
        if self.rank and not refusal:
            try:
                first = self.cards[0]
                self.segment = Segment.open(first["pid"], first["fd"], self.layout.size)
            except BackendUnavailable as error:
                refusal = str(error)
            except OSError as error:
                what = f"rank {self._names[self.rank]} cannot map {self.layout.size} bytes of it: {error}"
                refusal = self._refused(what)
        said = json.dumps({"refusal": refusal, "reads": reads})
        self._store.set(self._key("mapped", self.rank), said)
        answers = [json.loads(text) for text in self._read_all("mapped", timeout)]
        if refusals := [answer["refusal"] for answer in answers if answer["refusal"]]:
            raise BackendUnavailable(refusals[0])
        self.readable = all(answer["reads"] for answer in answers)

    def _refused(self, why: str) -> str:
        return (
            f"backend 'shm' has no memory for group {self.name}: {why}; raise the limit on address space (ulimit -v), "
            "or use backend 'gloo' for this group"
        )

    def _key(self, kind: str, rank: int) -> str:
        """Name what a rank says; by its number in the world, for groups without a common rank may have one name."""
        return f"{kind}/{self._names[rank]}"

    def _read_all(self, kind: str, timeout: timedelta) -> list[str]:
        keys = [self._key(kind, r) for r in range(self.ranks)]
        try:
            self._store.wait(keys, timeout)
        except RuntimeError as error:
            late = [self._names[r] for r, key in enumerate(keys) if not self._store.check([key])]
            raise PeerLost(
                f"group {self.name} of {self.ranks} ranks cannot open: ranks {late} did not come within "
                f"{timeout.total_seconds():g} s"
            ) from error
        return [self._store.get(key).decode() for key in keys]

    def _watch(self) -> tuple[Processes, str]:
        """Open handles on the others' processes; without the right to (a sandbox, too many files): none, and why."""
        try:
            processes = Processes(self.cards)
        except OSError as error:
            why = f"rank {self._names[self.rank]} cannot watch other processes: {error}"
            return Processes([]), f"backend 'shm' in group {self.name}: {why}; use backend 'gloo'"
        for rank in range(self.ranks):
            if processes.ended(rank):
                processes.close()
                raise PeerLost(f"{self._who(rank)} ended while group {self.name} opened")
        return processes, ""

    def _await(self, rank: int, level: int, beyond_s: float = 0.0) -> None:
        while not level <= self.note_of(rank) < _FAILED_BASE:
            late = time.monotonic() - self._deadline
            why = self.lost(rank)
            if not why and late > 0 and (late > beyond_s or self.stopped(rank)):
                why = self.slow(rank)
            if why:
                self.note_failure(rank)
                raise PeerLost(f"group {self.name} cannot open: {why}")
            time.sleep(2e-4)

    def note(self, value: int) -> None:
        """Leave a note for the others; a fork of the rank's process may not."""
        if os.getpid() == self.cards[self.rank]["pid"]:
            self.segment.words[self.layout.note(self.rank) // 8] = value

    def note_of(self, rank: int) -> int:
        """Read the note of a rank."""
        return int(self.segment.words[self.layout.note(rank) // 8])

    def note_failure(self, lost: int | None) -> None:
        """Tell the others that this rank gives up the group, and whom it lost."""
        self.note(_FAILED_BASE + (255 if lost is None else lost))

    def lost(self, rank: int) -> str:
        """Say why a rank will never come; "" if it may."""
        note, who = self.note_of(rank), self._who(rank)
        if note >= _FAILED_BASE:
            other = note - _FAILED_BASE
            why = "" if other == 255 else f", for it lost rank {self._names[other]}"
            return f"{who} has given up this group{why}"
        if self._processes.ended(rank):
            return f"{who} has ended"
        return f"{who} has closed this group" if note == CLOSED else ""

    def stopped(self, rank: int) -> bool:
        """Say whether the process of a rank is stopped by a signal."""
        return self._processes.stopped(rank)

    def slow(self, rank: int) -> str:
        """Say of a rank that lives but did not come what it looks like from outside."""
        how = "is stopped" if self.stopped(rank) else "lives but did not come"
        return f"{self._who(rank)} {how}"

    def called(self, rank: int) -> int:
        """Number a rank as in the world."""
        return self._names[rank]

    def _who(self, rank: int) -> str:
        return f"rank {self._names[rank]} (process {self.cards[rank]['pid']})"

    def close(self) -> None:
        """Tell the others, and let go of their processes."""
        if self.note_of(self.rank) < CLOSED:
            self.note(CLOSED)
        self._processes.close()


def check_platform() -> None:
    """Refuse a system without the calls that this backend rests on."""
    if not (sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")):
        raise BackendUnavailable("backend 'shm' needs Linux 5.3 or later; use backend 'gloo'")
