"""The command line: doctor, version, and errors without a traceback."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest
from typer.testing import CliRunner

from plait.parallel import doctor
from plait.parallel.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("plait 0.")


def test_commands_are_a_decision() -> None:
    """Growth of the command line is a decision: this list is edited with it."""
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert sorted(commands) == ["bench", "doctor", "experts", "explain", "plan"]
    (kv,) = app.registered_groups
    assert kv.name == "kv"
    assert sorted(c.callback.__name__ for c in kv.typer_instance.registered_commands) == [
        "bench", "compact", "inspect", "repair", "verify"
    ]  # fmt: skip


def test_doctor_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    findings = {f["topic"]: f for f in json.loads(run("doctor", "--json").output)}
    assert findings["torch"]["state"] == "ok"
    assert {"gloo", "shm", "mpi"} <= set(findings["backends"]["value"].replace(",", "").split())
    assert findings["launcher"]["value"].startswith("none")
    shown = run("doctor")
    assert shown.exit_code == 0
    for topic in findings:
        assert topic in shown.output


def test_doctor_names_the_pip_line_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setattr(doctor.shutil, "which", lambda *_: None)
    monkeypatch.setattr(doctor.sys, "executable", "/nowhere/python")
    shown = run("doctor")
    assert shown.exit_code == 0
    assert (
        "pip install 'plait[mpi]'" in shown.output
    )  # with its brackets: rich reads them as a style
    assert "pip install 'plait[hf]'" in shown.output
    findings = {f["topic"]: f for f in json.loads(run("doctor", "--json").output)}
    assert findings["mpirun"]["remedy"] == "pip install 'plait[mpi]'"
    assert findings["transformers"]["state"] == "absent"


def test_doctor_says_what_the_gpu_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        name, total_memory, major, minor = "H", 80 << 30, 9, 0

    cuda = doctor.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 3)
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: Device)
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: a + b == 1)
    problem = doctor.toolchain.Problem("libnvvm cannot be loaded", "pip install 'plait[cuda]'")
    monkeypatch.setattr(doctor.toolchain, "problem", lambda: problem)
    found = {f.topic: f for f in doctor.examine()}
    assert found["CUDA kernels"].value == "libnvvm cannot be loaded"
    assert found["CUDA kernels"].remedy == "pip install 'plait[cuda]'"
    assert found["peer memory"].value.startswith("not between cuda:0 and cuda:2, cuda:1 and cuda:2")
    monkeypatch.setattr(doctor.toolchain, "problem", lambda: None)
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: True)
    found = {f.topic: f for f in doctor.examine()}
    assert found["CUDA kernels"].state == found["peer memory"].state == "ok"


def test_doctor_fails_where_plait_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch, "__version__", "2.9.1+cu128")
    assert run("doctor").exit_code == 1
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert "WORLD_SIZE is not set" in result.output


def test_explain_says_what_is_wrong_with_a_plan() -> None:
    result = run("explain", "no-such-model", "tq2")
    assert result.exit_code == 2
    assert "plait: " in result.output
    assert "axis 'tq'" in result.output
    assert "Traceback" not in result.output
