"""The examples run as a user runs them: by torchrun, by mpirun, and as plain scripts."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

from jobs import mpirun, run_job, torchrun
from world import run_world

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ["--context", "600", "--chunk", "256", "--tokens", "12"]


@pytest.mark.parametrize(("size", "plan"), [(4, "kvp2 tp2"), (2, "tp2")])
def test_long_context_equals_one_process(tmp_path: Path, size: int, plan: str) -> None:
    job = run_job(
        [*torchrun(size), str(EXAMPLES / "long_context.py"), "--plan", plan, *SHORT], tmp_path
    )
    assert job.code == 0, job.output
    assert re.search(r"equal to one process\s+yes", job.output), job.output
    assert ("all_to_all over kvp" in job.output) == ("kvp" in plan)


def test_long_context_reads_a_given_file_under_mpirun(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = [
        *mpirun(2),
        str(EXAMPLES / "long_context.py"),
        "--text",
        str(text),
        *SHORT,
        "--temperature",
        "0",
    ]
    job = run_job(command, tmp_path / "job", TERM="dumb")
    assert job.code == 0, job.output
    assert re.search(r"equal to one process\s+yes", job.output), job.output


@pytest.mark.parametrize("launch", [[sys.executable], None], ids=["plain", "torchrun"])
def test_own_module(tmp_path: Path, launch: list[str] | None) -> None:
    command = [*(launch or torchrun(4)), str(EXAMPLES / "own_module.py")]
    job = run_job(command if launch else [*command, "kvp2 tp2"], tmp_path)
    assert job.code == 0, job.output
    found = re.search(r"from one process: (\S+)", job.output)
    assert found is not None, job.output
    assert float(found[1]) < 1e-5


def test_a_second_process_skips_the_prefill_of_the_first(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "persistent_prefix.py"), str(tmp_path / "cache")]
    jobs = [run_job([*command, "--tokens", "400"], tmp_path / name) for name in ("one", "two")]
    assert [job.code for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    assert "400 prompt tokens, 0 of them from disk" in jobs[0].output
    assert "400 prompt tokens, 384 of them from disk" in jobs[1].output
    assert "pages read 24" in jobs[1].output
    first, second = (re.search("answer.*", job.output) for job in jobs)
    assert first is not None
    assert second is not None
    assert first[0] == second[0]


@pytest.mark.parametrize(("size", "plan"), [(2, "cp2"), (4, "cp2:ulysses tp2")])
def test_long_training(tmp_path: Path, size: int, plan: str) -> None:
    script = [str(EXAMPLES / "long_training.py"), plan, "--tokens", "300", "--steps", "3"]
    job = run_job([*torchrun(size), *script], tmp_path)
    assert job.code == 0, job.output
    found = re.search(r"of any weight from one process: ([0-9.e+-]+)", job.output)
    assert found is not None, job.output
    assert float(found[1]) < 1e-5
    losses = [float(x) for x in re.findall(r"loss (\d\.\d+)", job.output)]
    assert losses[-1] < losses[0]


def as_script(name: str, arguments: list[str]) -> str:
    """Run an example as torchrun would, in a rank that has the heavy modules in memory; gives what it prints."""
    sys.argv, sys.path[:0] = [name, *arguments], [str(EXAMPLES)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def test_train_moe(tmp_path: Path) -> None:
    """Two plans train from each other's checkpoint as one process does, and a third decodes."""
    arguments = [str(tmp_path / "run"), "--steps", "4", "--tokens", "72"]
    said = run_world(as_script, 4, "train_moe.py", arguments)[0]
    found = re.search(r"of a loss from one process: ([0-9.e+-]+)", said)
    assert found is not None, said
    assert float(found[1]) < 1e-5
    assert "writes the same: yes" in said
    for picture in ("loss.png", "routers.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
