"""kill -9 while pages are written: the harnesses of tests/kvstore/faults.py and store_faults.py, a few dozen times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parent.parent / "faults.py"
STORE_HARNESS = HARNESS.with_name("store_faults.py")


def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path) -> None:
    command = [
        sys.executable,
        HARNESS,
        "--kills",
        "24",
        "--seed",
        "3",
        "--json",
        "--folder",
        tmp_path,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout)
    assert counts["kills"] == 24
    assert counts["bits flipped"] > 0
    assert counts["pages read"] > 100, "the children wrote too little for this to mean anything"


def test_the_harness_sees_a_tier_that_forgets_to_write_its_index() -> None:
    """Negative control: a commit that only says it was one."""
    code = f"import runpy, sys; sys.argv = ['faults.py', '--kills', '6', '--json']; \
from plait.kvstore.tiers import index; index.Index.append = lambda self, records: list(records); \
runpy.run_path({str(HARNESS)!r}, run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert json.loads(ended.stdout)["committed pages lost"] > 0


def test_a_killed_store_loses_nothing_that_was_flushed(tmp_path) -> None:
    command = [sys.executable, STORE_HARNESS, "--kills", "10", "--json", "--folder", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout)
    assert counts["kills"] == 10
    assert counts["pages found"] > 50, "the children flushed too little for this to mean anything"


def test_the_harness_sees_a_store_that_only_says_it_flushed() -> None:
    code = f"import runpy, sys; sys.argv = ['x', '--kills', '6', '--json']; \
sys.path.insert(0, {str(HARNESS.parent)!r}); from plait.kvstore.placement import Placement; \
Placement.flush = lambda self, seconds: True; runpy.run_path({str(STORE_HARNESS)!r}, run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert json.loads(ended.stdout)["flushed pages lost"] > 0
