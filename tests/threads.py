"""Run the same work on several threads, and let none fail unseen."""

from __future__ import annotations

import threading
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
