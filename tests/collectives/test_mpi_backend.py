"""Starts mpirun for the mpi backend: what it does (mpi/test_backend_in_mpi.py), and how a lost rank ends it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs import (
    Ended,
    find_mpirun,
    finish,
    mpirun,
    pytest_on,
    run_job,
    start,
    still_running,
    torchrun,
)
from plait.collectives import BackendUnavailable
from plait.collectives.mpi import register

HERE = Path(__file__).parent
TESTS = HERE.parent / "mpi" / "test_backend_in_mpi.py"
LOST = HERE / "job_mpi_lost.py"
# asked for within a second after the timeout, on top of what ran before the loss and a crowded machine
BOUND_S = 60.0

pytest.importorskip("mpi4py")


def under_pytest(folder: Path, *options: str, **env: str) -> Ended:
    pytest.importorskip("pytest_mpi")
    job = start([*pytest_on(4, folder), str(TESTS), *options], folder, OMP_NUM_THREADS="1", **env)
    return finish(job, folder, timeout=500)  # four ranks import torch on as many cores as there are


def lose(how: str, folder: Path, *options: str, ranks: int = 2) -> Ended:
    """Run a job that loses a rank; nothing is left of it: no process, no segment, no folder of MPI's."""
    place = folder / "mpi"
    place.mkdir()
    ended = run_job(
        [*mpirun(ranks, *options), str(LOST), how],
        folder,
        PYTHONPATH=f"{HERE.parent}{os.pathsep}{HERE.parents[1]}",
        OMP_NUM_THREADS="1",
        TMPDIR=str(place),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        OMPI_MCA_btl_sm_backing_directory=str(place),
    )
    assert not still_running(folder)
    meetings = place / f"plait-{os.getuid()}"  # the user's, for all jobs: it stays, and is empty
    assert [path for path in place.rglob("*") if path != meetings] == []
    # a fault-tolerant mpirun whose other ranks end in order counts that as success
    assert ended.code != 0 or "ulfm" in options
    return ended


@pytest.mark.slow
def test_conformance_and_users(tmp_path: Path) -> None:
    ended = under_pytest(tmp_path)
    assert ended.code == 0, ended.output
    assert ended.output.count(" passed") == 4, ended.output
    assert " skipped" not in ended.output


@pytest.mark.slow
def test_calls_take_turns_where_mpi_wants_it(tmp_path: Path) -> None:
    """MPI_THREAD_SERIALIZED: one MPI call at a time, from any thread."""
    chosen = "groups or async or futures or threads or uneven"
    ended = under_pytest(tmp_path, "-k", chosen, MPI4PY_RC_THREAD_LEVEL="serialized")
    assert ended.code == 0, ended.output
    assert ended.output.count(" passed") == 4, ended.output


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    ended = lose("stop", tmp_path, ranks=3)
    assert set(ended.reports) == {0, 2}, ended.output
    for told in ended.reports.values():
        assert "rank 1 does not answer: it is dead or stopped" in told["lost"]
        assert told["lost"].startswith(("all_reduce [", "broadcast ["))
        assert told["again"] == told["lost"]
        assert told["seconds"] < BOUND_S


@pytest.mark.slow
def test_a_stopped_rank_is_given_up_before_a_long_timeout(tmp_path: Path) -> None:
    ended = lose("stop_patiently", tmp_path, ranks=3)
    assert set(ended.reports) == {0, 2}, ended.output
    for told in ended.reports.values():
        assert "rank 1 does not answer: it is dead or stopped" in told["lost"]
        assert told["seconds"] < BOUND_S


@pytest.mark.slow
def test_an_error_of_one_rank_reaches_the_others(tmp_path: Path) -> None:
    ended = lose("raise", tmp_path)
    assert set(ended.reports) == {0}, ended.output
    for told in ended.reports.values():
        assert "rank 1 has ended with ValueError: my own error" in told["lost"]
        assert told["seconds"] < BOUND_S


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise_in_ddp", "rank 1 has ended with ValueError"),
        ("stop_in_ddp", "it is dead or stopped"),
    ],
)
def test_training_ends_with_words_too(how: str, words: str, tmp_path: Path) -> None:
    ended = lose(how, tmp_path, ranks=3)
    assert set(ended.reports) == {0, 2}, ended.output
    for told in ended.reports.values():
        assert words in told["lost"]
        assert "PeerLost: all_reduce [" in told["lost"]
        assert told["again"]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    """By default mpirun ends all ranks when one dies, and says which."""
    ended = lose("kill", tmp_path)
    assert ended.reports == {}
    assert "signal 9" in ended.output or "Killed" in ended.output


@pytest.mark.slow
def test_a_killed_rank_is_named_by_a_fault_tolerant_mpi(tmp_path: Path) -> None:
    if "Open MPI" not in run_job([find_mpirun(), "--version"], tmp_path).output:
        pytest.skip("--with-ft is an option of Open MPI")
    ended = lose("kill", tmp_path, "--with-ft", "ulfm", ranks=3)
    assert set(ended.reports) == {0, 2}, ended.output
    for told in ended.reports.values():
        assert "rank 1 is dead" in told["lost"]
        assert told["seconds"] < BOUND_S


@pytest.mark.slow
def test_who_works_on_for_long_is_not_lost(tmp_path: Path) -> None:
    """All gave up a message that never came; who ends first waits for the others longer than for one that is lost."""
    job = tmp_path / "job.py"
    job.write_text(
        "import time\n"
        "import torch\n"
        "import torch.distributed as dist\n"
        "from plait.collectives import init\n"
        "from plait.collectives.mpi import progress, register\n"
        "progress.FAREWELL_S = 0.1\n"
        "world = init(register(), timeout_s=200)\n"
        "group = dist.new_group()\n"
        "work = dist.irecv(torch.ones(3), (world.rank + 1) % world.size, group=group)\n"
        "dist.destroy_process_group(group)\n"
        "assert dist.group.WORLD.engine.abandoned\n"
        "dist.barrier()\n"
        "time.sleep(2.0 * world.rank)\n"
    )
    ended = run_job([*mpirun(3), str(job)], tmp_path / "reports", OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opens", "who"),
    [
        ("init(register(), timeout_s=60)", "torch"),
        ("register(), init_process_group('mpi')", "torchrun"),
    ],
)
def test_torchrun_cannot_start_it(opens: str, who: str, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        "import os\n"
        "from torch.distributed import init_process_group\n"
        "from plait.collectives import BackendUnavailable, init\n"
        "from plait.collectives.mpi import register\n"
        "try:\n"
        f"    {opens}\n"
        "except BackendUnavailable as error:\n"
        "    os.write(1, f'refused: {error}\\n'.encode())  # in one piece: two ranks write at once\n"
    )
    ended = run_job([*torchrun(2), str(job)], tmp_path / "reports")
    assert ended.output.count(f"refused: {who} counts this as rank") == 2, ended.output
    assert "under torchrun use gloo" in ended.output


def test_without_mpi4py_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'plait\[mpi\]'"):
        register()
