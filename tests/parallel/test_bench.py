"""`plait bench` lists the benchmarks of this checkout and runs one with its own options."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plait.parallel.cli import app

NAMES = {path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py")} - {
    "contest",
    "disk_contenders",
    "netns",
}


def test_every_benchmark_is_listed_with_what_it_does() -> None:
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 0
    listed = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert set(listed) == NAMES
    assert all(about.endswith(".") for about in listed.values())


def test_options_go_to_the_benchmark_and_its_exit_code_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        ran.append([str(part) for part in command[1:]])
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    result = CliRunner().invoke(app, ["bench", "helix_decode", "--rounds", "3"])
    assert result.exit_code == 7
    assert [Path(ran[0][0]).name, *ran[0][1:]] == ["helix_decode.py", "--rounds", "3"]


def test_an_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    result = CliRunner().invoke(app, ["bench", "nope"])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in NAMES)
