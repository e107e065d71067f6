"""A measured machine: figures with sources, a file that reads back, and plans for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from plait.parallel import Plan, PlanError
from plait.parallel.planner import calibration
from plait.parallel.planner.answer import answer
from plait.parallel.planner.auto import here
from plait.parallel.planner.catalogue import hardware
from plait.parallel.planner.command import plan
from plait.parallel.planner.efficiency import fitted
from plait.parallel.planner.goals import Goal
from plait.parallel.planner.reading import decoder


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    calibration.save(calibration.calibrate("cpu", rounds=1), path)
    return path


def test_a_calibrated_machine_reads_back_and_is_used(machine: Path) -> None:
    part = hardware(str(machine))
    assert part == calibration.load(machine)
    assert fitted(part) is part.constants
    assert all(
        "measured" in figure.source or "assumed" in figure.source
        for figure in part.figures().values()
    )
    assert "measured" in part.memory_bandwidth.source
    assert part.bf16.value > 1e8
    assert part.memory_bandwidth.value > 1e7
    said = answer(
        "qwen3-8b", str(machine), Goal(ranks=4, context=128, weights=("mxfp4",), kv=("fp8",))
    )
    assert said.proposals[0].provenance.startswith("extrapolated: no measured point on this CPU")


def test_the_command_measures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Path
) -> None:
    monkeypatch.setattr(calibration, "calibrate", lambda: calibration.load(machine))
    app = typer.Typer()
    app.command("plan")(plan)
    said = CliRunner().invoke(app, ["--calibrate", str(tmp_path / "mine.json")])
    assert said.exit_code == 0
    assert "memory_bandwidth" in said.output
    assert calibration.load(tmp_path / "mine.json") == calibration.load(machine)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"constants": {}}', None])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PlanError, match="is no calibrated machine"):
        hardware(str(path))


def test_a_figure_that_lost_its_source_is_refused(tmp_path: Path, machine: Path) -> None:
    data = json.loads(machine.read_text())
    data["bf16"]["source"] = ""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="has no source"):
        hardware(str(path))


@pytest.mark.parametrize("name", ["llama-8b", "deepseek-r1", "gpt-oss-20b"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_here_is_one_legal_plan_of_axes_that_run(name: str, ranks: int) -> None:
    shape = decoder(name).shape
    if name == "deepseek-r1" and ranks < 16:
        with pytest.raises(PlanError, match="fits by none"):
            here(shape, ranks, device_name="NVIDIA H100 80GB HBM3")
        return
    found = here(shape, ranks, device_name="NVIDIA H100 80GB HBM3")
    found.validate(shape, world_size=ranks)
    assert (found.pp.size, found.dp.size, found.ep.size, found.kvp.chunks) == (1, 1, 1, "auto")
    assert here(shape, ranks, device_name="NVIDIA H100 80GB HBM3") == found
    assert isinstance(here(shape, ranks), Plan)
