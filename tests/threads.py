"""Threads of tests: the same work on several, none of which fails unseen; an interruption; what others do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable


def run_threads(work: Callable[[int], None], count: int = 8, seconds: float = 120) -> None:
    """Call `work(0)` to `work(count - 1)` at the same time; raise the first problem of any.

    Raises:
        TimeoutError: if one of them does not end in time.
    """
    problems: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    if problems:
        raise problems[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"a thread did not end in {seconds} s")


def appears(seen: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait for what comes by itself, a minute at most; say whether it came."""
    until = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < until:
        time.sleep(0.005)
    return found


def interrupt_wait(seconds: float, before: Callable[[], object] = lambda: None) -> None:
    """Send Ctrl-C to this process when its main thread has been in a `wait` for so long; first, call `before`."""
    main = threading.main_thread().ident

    def waits() -> bool:
        frame = sys._current_frames()[main]  # type: ignore[index]
        while frame is not None and frame.f_code.co_name != "wait":
            frame = frame.f_back
        return frame is not None

    def run() -> None:
        since = time.monotonic()
        while time.monotonic() < since + seconds:
            since = since if waits() else time.monotonic()
            time.sleep(0.02)
        before()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=run, daemon=True).start()
