"""The sockets that gloo opens: whoever else holds one hides from the other ranks that this rank has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OPEN = Path("/proc/self/fd")  # on systems without it, nothing is known, and nothing is let go


class Sockets:
    """Those that were opened while a group connected.

    A connection ends when the last process that has it open ends. A DataLoader's worker, or any other fork, has all
    that its parent had: where it outlives a rank that was killed, the others' gloo sees nothing, and waits.
    """

    def __init__(self) -> None:
        self._mine: dict[int, str] = {}  # by descriptor: which socket it is

    @contextmanager
    def opened_here(self) -> Iterator[None]:
        """Take note of what is opened in this block, and keep it from programs that this process starts."""
        before = _open_sockets()
        yield
        after = _open_sockets()
        self._mine = {fd: name for fd, name in after.items() if before.get(fd) != name}
        for fd in self._mine:
            with suppress(OSError):  # another thread's, closed since
                os.set_inheritable(fd, False)

    def let_go(self) -> None:
        """In a fork: close them. Their numbers stay taken, for gloo's memory here still names them."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in self._mine:
            if _named(fd) == self._mine[fd]:
                os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)
        self._mine = {}


def _open_sockets() -> dict[int, str]:
    """List this process' sockets by descriptor; a name is never given twice."""
    if not OPEN.is_dir():
        return {}
    named = {int(entry.name): _named(int(entry.name)) for entry in OPEN.iterdir()}
    return {fd: name for fd, name in named.items() if name.startswith("socket:")}


def _named(fd: int) -> str:
    try:
        return str((OPEN / str(fd)).readlink())
    except OSError:  # closed since
        return ""
