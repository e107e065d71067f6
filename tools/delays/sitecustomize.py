"""Delays as of a busy machine or a slow disk, in every Python process of a command: they find tests that need speed.

    DELAYS=late,stall PYTHONPATH=tools/delays .venv/bin/python -m pytest -p no:cacheprovider tests/kvstore

late     threads begin 0.4 s after they are started
wake     who waits for another thread wakes up to 50 ms later
switch   threads take turns of 50 ms
disk     files are written, read, renamed and made durable up to 50 ms later
start    processes, and forks of a rank's fork server, begin up to 1.5 s late
stall    a process stands still for 20 to 400 ms now and then, with all its threads

Python reads a module of this name before anything else. It has no part in a run whose PYTHONPATH does not name it.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def delayed(real: Callable[..., Any], seconds: Callable[[], float], after: bool = False) -> Any:
    """Make a function that takes longer, before or after what it does."""

    def slow(*given: Any, **options: Any) -> Any:
        if not after:
            time.sleep(seconds())
        found = real(*given, **options)
        if after:
            time.sleep(seconds())
        return found

    return slow


def late(draw: random.Random) -> None:
    threading.Thread.run = delayed(threading.Thread.run, lambda: 0.4)


def wake(draw: random.Random) -> None:
    threading.Condition.wait = delayed(
        threading.Condition.wait, lambda: draw.choice((0, 0, 0.01, 0.05)), after=True
    )


def switch(draw: random.Random) -> None:
    sys.setswitchinterval(0.05)


def disk(draw: random.Random) -> None:
    for name in ("fsync", "fdatasync", "pwrite", "pwritev", "preadv", "rename", "replace"):
        setattr(os, name, delayed(getattr(os, name), lambda: draw.random() * 0.05))


def start(draw: random.Random) -> None:
    """Begin late; a fork does it anew, with draws of its own."""
    time.sleep(draw.choice((0, 0.5, 1.5)))


def stall(draw: random.Random) -> None:
    """Stand still now and then: a thread that sleeps in C with the interpreter's lock; in a fork, a new one."""
    library = ctypes.PyDLL(None)

    def run() -> None:
        while True:
            time.sleep(draw.random() * 2)
            library.usleep(draw.choice((20_000, 100_000, 400_000)))

    threading.Thread(target=run, daemon=True, name="stall").start()


MODES = {mode.__name__: mode for mode in (late, wake, switch, disk, start, stall)}
OF_EACH_FORK = ("start", "stall")


def begin(names: list[str], of_fork: bool = False) -> None:
    """Bring the delays asked for."""
    if unknown := set(names) - set(MODES):
        sys.exit(f"DELAYS knows {', '.join(MODES)}; not {', '.join(sorted(unknown))}")
    draw = random.Random(os.getpid())
    for name in names:
        if name in OF_EACH_FORK or not of_fork:
            MODES[name](draw)


if asked := [name for name in os.environ.get("DELAYS", "").split(",") if name]:
    begin(asked)
    os.register_at_fork(after_in_child=lambda: begin(asked, of_fork=True))
