"""tools/install.py: which torch a machine gets."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "install.py"
CPU = {
    "install": [
        {"metadata": {"name": "torch", "requires_dist": ["filelock", 'optree; extra == "optree"']}}
    ]
}
CUDA_NEEDS = [
    "filelock",
    'nvidia-cudnn-cu13==9.13.0.50; platform_system == "Linux"',
    'cuda-toolkit[cublas,cudart]==13.0.2; platform_system == "Linux"',
    'nvidia-extra; extra == "more"',
]
CUDA = {"install": [{"metadata": {"name": "torch", "requires_dist": CUDA_NEEDS}}]}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("TORCH", raising=False)
    spec = importlib.util.spec_from_file_location("install_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


def commands(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpu: bool,
    report: dict[str, Any],
    uv_works: bool = True,
) -> list[str]:
    """Run install_torch with every command recorded and none executed."""
    said: list[str] = []

    def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        line = " ".join(map(str, command))
        said.append(line)
        if "--dry-run" in line:
            return subprocess.CompletedProcess(command, 0, stdout=json.dumps(report))
        return subprocess.CompletedProcess(
            command, int(" uv pip" in line and not uv_works), stdout="2.13.0"
        )

    monkeypatch.setattr(tool.subprocess, "run", run)
    monkeypatch.setattr(tool, "has_nvidia_gpu", lambda: gpu)
    tool.install_torch(Path("python"), "demo")
    return said


def test_cuda_packages_are_seen_in_pips_report(tool: ModuleType) -> None:
    assert tool.cuda_packages(CPU) == []
    assert tool.cuda_packages(CUDA) == ["nvidia-cudnn-cu13", "cuda-toolkit"]


def test_a_cpu_machine_takes_the_cpu_build(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = commands(tool, monkeypatch, gpu=False, report=CUDA)
    assert any("--torch-backend cpu torch==" in line for line in said)
    assert not any(line.startswith("python -m pip install --no-compile torch==") for line in said)


def test_a_cpu_machine_whose_pip_brings_no_cuda_just_installs(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = commands(tool, monkeypatch, gpu=False, report=CPU)
    assert any(line.startswith("python -m pip install --no-compile torch==") for line in said)
    assert not any(" uv " in line for line in said)


def test_a_gpu_machine_takes_what_pip_brings(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = commands(tool, monkeypatch, gpu=True, report=CUDA)
    assert said[0].startswith("python -m pip install --no-compile torch==")


def test_a_named_build_is_taken(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH", "./my-torch.whl")
    assert (
        commands(tool, monkeypatch, gpu=False, report=CUDA)[0]
        == "python -m pip install --no-compile ./my-torch.whl"
    )


def test_no_cpu_build_stops_and_says_what_to_do(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="TORCH=torch make demo") as stopped:
        commands(tool, monkeypatch, gpu=False, report=CUDA, uv_works=False)
    assert "nvidia-cudnn-cu13" in str(stopped.value)


def test_constraints_name_the_tested_torch(tool: ModuleType) -> None:
    assert tool.tested_version("torch").startswith("torch==2.")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_machine_gets_the_compiler_of_the_kernels(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(tool, "has_nvidia_gpu", lambda: gpu)
    assert tool.extras_for("dev") == ("dev,cuda" if gpu else "dev")
