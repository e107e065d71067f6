"""Starts mpirun with pytest on every rank, for the tests of tests/mpi."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import pytest_on, run_job

TESTS = Path(__file__).parents[1] / "mpi" / "test_in_mpi.py"


@pytest.mark.slow
def test_tests_mpi_under_mpirun(tmp_path: Path) -> None:
    pytest.importorskip("pytest_mpi")
    ended = run_job([*pytest_on(2, tmp_path), str(TESTS)], tmp_path)
    assert ended.code == 0, ended.output
    assert ended.output.count("3 passed") == 2, ended.output


@pytest.mark.slow
def test_one_failing_rank_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "test_fails.py").write_text(
        "import pytest, torch\n"
        "import torch.distributed as dist\n"
        "from plait.collectives.world import init\n"
        "@pytest.mark.mpi\n"
        "def test_half():\n"
        "    world = init(timeout_s=120)\n"
        "    assert world.rank == 0, 'only one rank fails'\n"
        "    dist.barrier()\n"
    )
    command = [*pytest_on(2, tmp_path), "--rootdir", str(tmp_path)]
    ended = run_job([*command, str(tmp_path / "test_fails.py")], tmp_path / "reports")
    assert ended.code != 0
    assert "only one rank fails" in ended.output
