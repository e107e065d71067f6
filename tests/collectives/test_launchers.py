"""The same script under every real launcher: python, torchrun, mpirun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs import environment, finish, mpi_launcher, mpirun, run_job, start, torchrun

SCRIPT = str(Path(__file__).with_name("job_init.py"))


def check(ended, size: int, launcher: str) -> None:
    assert ended.code == 0, ended.output
    assert sorted(ended.reports) == list(range(size)), ended.output
    for report in ended.reports.values():
        assert report["size"] == size
        assert report["launcher"] == launcher
        assert report["total"] == size * (size + 1) / 2
        assert report["local"][1] == size
    assert ended.output.count(f"only rank 0 of {size} says this") == 1
    assert ended.output.count("says this") == 1


def test_plain_python(tmp_path: Path) -> None:
    check(run_job([sys.executable, SCRIPT], tmp_path), 1, "alone")


def test_torchrun(tmp_path: Path) -> None:
    check(run_job([*torchrun(2), SCRIPT], tmp_path), 2, "torchrun")


@pytest.mark.parametrize("size", [2, 3])
def test_mpirun_needs_no_mpi4py(tmp_path: Path, size: int) -> None:
    ended = run_job([*mpirun(size), SCRIPT], tmp_path)
    check(ended, size, mpi_launcher())
    for report in ended.reports.values():
        assert not report["mpi4py"]
        assert 1 <= report["threads"] <= report["cpus"]


@pytest.mark.parametrize("where", ["every rank", "rank 1"])
def test_mpirun_without_mpi4py_says_on_every_rank_what_adds_it(tmp_path: Path, where: str) -> None:
    script = tmp_path / "asks.py"
    script.write_text(
        "import os, sys\n"
        "from plait.collectives import BackendUnavailable, LaunchError, init\n"
        "from plait.collectives.launch import Launch\n"
        f"if {where == 'every rank'} or Launch.detect().rank == 1:\n"
        "    sys.modules['mpi4py'] = None\n"
        "try:\n"
        "    init('mpi', timeout_s=500)\n"
        "except (BackendUnavailable, LaunchError) as error:\n"
        "    os.write(1, f'refused: {error}\\n'.encode())\n"
        "    sys.exit(1)\n"
    )
    ended = run_job([*mpirun(2), str(script)], tmp_path / "reports")
    assert ended.code != 0
    assert "pip install 'plait[mpi]'" in ended.output, ended.output
    assert 1 <= ended.output.count("refused: ") <= 2, ended.output  # mpirun may end the other first


def test_mpirun_over_hosts_meets_through_mpi4py(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    command = [*mpirun(2), "-c"]
    # one rank on each of two hosts, as far as the variables tell
    ranks, rank = "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
    if mpi_launcher() == "mpich":
        ranks, rank = "MPI_LOCALNRANKS", "MPI_LOCALRANKID"
    pretend = f"import os, runpy; os.environ[{ranks!r}] = '1'; os.environ[{rank!r}] = '0'; "
    pretend += f"runpy.run_path({SCRIPT!r})"
    ended = run_job([*command, pretend], tmp_path)
    assert ended.code == 0, ended.output
    assert [ended.reports[rank]["total"] for rank in range(2)] == [3.0, 3.0]
    assert all(report["mpi4py"] for report in ended.reports.values())


def test_two_jobs_at_the_same_time(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    jobs = [start([*mpirun(2), SCRIPT, folder.name], folder) for folder in folders]
    for job, folder in zip(jobs, folders, strict=True):
        ended = finish(job, folder)
        check(ended, 2, mpi_launcher())
        assert {tuple(report["job"]) for report in ended.reports.values()} == {(folder.name,)}


def test_launchers_that_disagree(tmp_path: Path) -> None:
    ended = run_job([*mpirun(2), SCRIPT], tmp_path, RANK="0", WORLD_SIZE="2")
    assert ended.code != 0
    assert "launchers disagree" in ended.output


@pytest.mark.parametrize("launcher", [torchrun, mpirun])
def test_a_rank_that_dies_before_init_ends_the_job(tmp_path: Path, launcher) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import sys\n"
        "from plait.collectives.launch import Launch\n"
        "from plait.collectives.world import init\n"
        "if Launch.detect().rank == 1:\n"
        "    sys.exit('no luck here')\n"
        "init(timeout_s=120)\n"
        "print('never printed')\n"
    )
    ended = run_job([*launcher(2), str(script)], tmp_path / "reports")
    assert ended.code != 0
    assert "no luck here" in ended.output
    assert "never printed" not in ended.output


def test_a_rank_that_leaves_quietly_is_named(tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(
        "from plait.collectives.launch import Launch\n"
        "from plait.collectives.world import init\n"
        "if Launch.detect().rank != 1:\n"
        "    init(timeout_s=3)\n"
    )
    ended = run_job([*mpirun(2), str(script)], tmp_path / "reports")
    assert ended.code != 0
    assert "LaunchError: rank 1 of 2 did not reach plait.init() within 3 s" in ended.output


def test_the_environment_of_jobs_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "7")
    monkeypatch.setenv("RANK", "7")
    assert not {"OMPI_COMM_WORLD_RANK", "RANK"} & environment().keys()
