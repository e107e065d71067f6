"""The ranks of a group over gloo: who lives, and what they say of each other when something takes long or fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import PeerLost
from ..processes import Processes, own_card

PATIENCE_S = 1.0  # a connection ends a little before its process does, and words need a moment
WORDS_S = 2.0  # the store may be held by the rank that is lost
LOOK_S = 0.02


class Members:
    """Ranks by their number in the group; words travel through the store, and only when something is slow or lost.

    State: a handle on every other process of this host.
    """

    def __init__(
        self, store: Any, rank: int, names: Sequence[int], timeout: timedelta, name: str
    ) -> None:
        """Meet the others.

        Collective: all members, a small card each through the store.

        Raises:
            PeerLost: ranks did not come; names them.
        """
        self.rank, self.names, self.name = rank, list(names), name
        self.others = [r for r in range(len(self.names)) if r != rank]
        self._store = store
        self._processes = self._meet(timeout)

    def _meet(self, timeout: timedelta) -> Processes:
        self._store.set(f"card/{self.rank}", json.dumps(own_card()))
        keys = [f"card/{r}" for r in range(len(self.names))]
        try:
            self._store.wait(keys, timeout)
        except RuntimeError as error:
            late = [self.names[r] for r, key in enumerate(keys) if not self._store.check([key])]
            raise PeerLost(
                f"group {self.name} of {len(keys)} ranks cannot open: ranks {late} did not come within "
                f"{timeout.total_seconds():g} s"
            ) from error
        cards = [json.loads(self._store.get(key)) for key in keys]
        try:
            return Processes(cards)
        except OSError:  # a system without handles on processes: only words tell
            return Processes([{**card, "host": ""} for card in cards])

    # ---- words

    def say_lost(self, why: str) -> None:
        """Tell the others of this group why this rank gave it up."""
        _within(WORDS_S, lambda: self._store.set(f"lost/{self.rank}", why), None)

    def say_where(self, where: str) -> None:
        """Tell all groups in which call this process has been for long; "" if in none."""
        _within(WORDS_S, lambda: self._world.set(self._key("waits", self.rank), where), None)

    def say_farewell(self, reason: str) -> None:
        """Tell all groups with what error this process ends."""
        _within(WORDS_S, lambda: self._world.set(self._key("left", self.rank), reason), None)

    @property
    def _world(self) -> Any:
        """The store that all groups share."""
        return distributed_c10d._get_default_store() if dist.is_initialized() else self._store

    def _key(self, kind: str, rank: int) -> str:
        return f"plait/{kind}/{self.names[rank]}"

    def _heard(self, kind: str) -> dict[int, str]:
        """Read what the others have told all groups."""
        return self._read(self._world, {r: self._key(kind, r) for r in self.others})

    def _given_up(self) -> dict[int, str]:
        """Read why others gave up this group."""
        return self._read(self._store, {r: f"lost/{r}" for r in self.others})

    def _read(self, store: Any, keys: dict[int, str]) -> dict[int, str]:
        found: dict[int, str] = {}

        def read() -> None:
            for r, key in keys.items():
                if store.check([key]):
                    found[r] = store.get(key).decode()

        _within(WORDS_S, read, None)
        return dict(found)

    # ---- who is missing

    def stopped(self) -> list[int]:
        """Give the ranks whose processes are stopped by a signal."""
        return [r for r in self.others if self._processes.stopped(r)]

    def why(self, waiting: str, late: bool, peers: Sequence[int]) -> str:
        """Say why a call could not end: whom it lost.

        Args:
            waiting: what this rank has told that it waits in.
            late: gloo ran out of time; otherwise a connection ended.
            peers: the ranks that the call needs.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            reasons = self._lost()
            if reasons or late or time.monotonic() > deadline:
                break
            time.sleep(LOOK_S)
        if reasons:
            return "; ".join(reasons.values())
        given_up = self._given_up()
        if given_up:
            return "; ".join(f"{self._who(r)} has given up: {text}" for r, text in given_up.items())
        places = self._heard("waits")
        return "; ".join(filter(None, (self._place(r, places.get(r), waiting) for r in peers)))

    def _lost(self) -> dict[int, str]:
        """Say of the ranks that are lost how; of those that ended because of a loss only where nobody else is."""
        ended = [r for r in self.others if self._processes.ended(r)]
        reasons = {r: f"{self._who(r)} is stopped" for r in self.stopped()}
        left = self._heard("left")
        for r in sorted({*ended, *left}):
            reason = f" with {left[r]}" if left.get(r) else ""
            reasons[r] = f"{self._who(r)} has ended{reason}"
        given_up = self._given_up() if len(reasons) > 1 else {}
        first = {r: text for r, text in reasons.items() if r not in given_up}
        return first or reasons

    def _place(self, rank: int, waits: str | None, own: str) -> str:
        """Say where a rank is that lives as far as is known; "" if it waits in the same call."""
        if waits == own:
            return ""
        how = f"waits in {waits}" if waits else "has not come"
        return f"{self._who(rank)} {how}"

    def _who(self, rank: int) -> str:
        return f"rank {self.names[rank]} (process {self._processes.cards[rank]['pid']})"

    def close(self) -> None:
        """Let go of the processes."""
        self._processes.close()


def _within(seconds: float, ask: Callable[[], Any], otherwise: Any) -> Any:
    """Do what may block for ever in a thread of its own, and wait no longer than this."""
    answers: list[Any] = []

    def run() -> None:
        with suppress(RuntimeError):  # the store is gone
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
