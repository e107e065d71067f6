"""kill -9 while pages are written: the harnesses of tests/kvstore/faults.py and store_faults.py, a few dozen times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parent.parent / "faults.py"
STORE_HARNESS = HARNESS.with_name("store_faults.py")


def run(harness: Path, *words: object, mutation: str = "pass") -> tuple[int, dict[str, int]]:
    """Run a harness, after some statements that change the library; give its exit status and counts."""
    code = f"import runpy, sys; sys.path.insert(0, {str(HARNESS.parent)!r}); {mutation}; \
runpy.run_path({str(harness)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "--json", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path) -> None:
    status, counts = run(HARNESS, "--kills", 24, "--seed", 3, "--folder", tmp_path)
    assert status == 0, counts
    assert counts["kills"] == 24
    assert counts["bits flipped"] > 0
    assert counts["pages read"] > 100, "the children wrote too little for this to mean anything"


def test_the_harness_sees_a_tier_that_forgets_to_write_its_index() -> None:
    """Negative control: a commit that only says it was one."""
    forget = "from plait.kvstore.tiers import index; index.Index.append = lambda self, records: list(records)"
    status, counts = run(HARNESS, "--kills", 6, mutation=forget)
    assert status == 1
    assert counts["committed pages lost"] > 0


def test_a_killed_store_loses_nothing_that_was_flushed(tmp_path) -> None:
    status, counts = run(STORE_HARNESS, "--kills", 10, "--folder", tmp_path)
    assert status == 0, counts
    assert counts["kills"] == 10
    assert counts["pages found"] > 50, "the children flushed too little for this to mean anything"


def test_the_harness_sees_a_store_that_only_says_it_flushed() -> None:
    """Negative control: nothing is ever sent down, so that `flush` has nothing to wait for."""
    hold = "from plait.kvstore.outbox import Outbox; Outbox.admitted = lambda self, pages: None"
    status, counts = run(STORE_HARNESS, "--kills", 6, mutation=hold)
    assert status == 1
    assert counts["flushed pages lost"] > 0
