"""A slice of torch's own distributed tests over the shm backend; all of them: tools/torch_suite.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs import run_job

TOOL = Path(__file__).parents[2] / "tools" / "torch_suite.py"
SLICE = (
    "test_all_gather_coalesced_simple",
    "test_all_reduce_sum_async",
    "test_all_to_all_single_unequal_split_group",
    "test_barrier_group",
    "test_reduce_sum_twice",
    "test_send_recv_any_source",
)


@pytest.mark.slow
def test_torchs_own_tests_pass(tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="torch's tests need it: pip install expecttest")
    command = [sys.executable, str(TOOL), "shm", "--ranks", "3", "--only", *SLICE]
    ended = run_job(command, tmp_path, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.output
    assert ended.output.count("passed  test_") >= len(SLICE), ended.output
