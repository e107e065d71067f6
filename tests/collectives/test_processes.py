"""What a rank knows of the others' processes, and that it lets go of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.collectives.processes import Card, Processes, own_card


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def card_of(child: subprocess.Popen[bytes]) -> Card:
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return {**own_card(), "pid": child.pid, "born": stat[19]}


def test_a_process_is_seen_to_stop_and_to_end() -> None:
    files = open_files()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        known = Processes([own_card(), card_of(child), {**card_of(child), "born": "1"}])
        assert [known.ended(n) for n in range(3)] == [False, False, True]  # the last has its number
        child.send_signal(signal.SIGSTOP)
        while not known.stopped(1):
            time.sleep(0.01)
        assert not known.ended(1)
        assert not known.stopped(0)
    finally:
        child.kill()
        child.wait()
    assert known.ended(1)
    known.close()
    assert open_files() == files


def test_a_refused_handle_leaves_none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], os.pidfd_open

    def once(pid: int) -> int:
        if opened:
            raise OSError(24, "Too many open files")
        opened.append(real(pid))
        return opened[0]

    other = {**own_card(), "pid": os.getppid()}
    files = open_files()
    monkeypatch.setattr(os, "pidfd_open", once)
    with pytest.raises(OSError, match="Too many"):
        Processes([other, other])
    assert opened
    assert open_files() == files
