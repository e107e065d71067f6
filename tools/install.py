"""Make .venv and install plait in it, with the torch that fits this machine; `make` calls it.

Needs only Python. On Linux the torch of the default index brings gigabytes of CUDA packages, so on a
machine without an NVIDIA GPU this asks pip first what it would bring, and if that is a CUDA build it
takes the CPU build instead. docs/decisions/005-cpu-torch.md tells why it is done this way.

Environment:
    TORCH   what to install as torch, in pip's words (default: the version in constraints.txt)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
CUDA_PREFIXES = ("nvidia-", "cuda-")
NO_CPU_BUILD = """
This machine has no NVIDIA GPU, but pip would bring the CUDA build of torch ({packages}, ...: gigabytes),
and the CPU build could not be fetched. Choose one:
  * give pip the CPU index that the install selector on PyTorch's site shows for "Linux, Pip, CPU":
        PIP_EXTRA_INDEX_URL=<that address> make {target}
  * name the build yourself, for example a wheel you have:
        TORCH=path/to/torch-...+cpu-....whl make {target}
  * take the CUDA build all the same:
        TORCH=torch make {target}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="dev", help="comma-separated extras of plait")
    parser.add_argument("--target", default="test", help="the make target to name in messages")
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(
            f"plait needs Python {OLDEST[0]}.{OLDEST[1]} or newer; this is {sys.version.split()[0]}. "
            "Name another one: make PYTHON=python3.12 ..."
        )
    python = make_venv(options.venv)
    version = installed_torch(python) or install_torch(python, options.target)
    install_plait(python, extras_for(options.extras), version)
    print(f"plait is installed in {options.venv} with torch {version}")


def extras_for(asked: str) -> str:
    """With a GPU the compiler of the CUDA kernels comes too: without it their tests have nothing to test."""
    return f"{asked},cuda" if sys.platform == "linux" and has_nvidia_gpu() else asked


def make_venv(folder: Path) -> Path:
    """Create the virtual environment unless it is there; returns its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (python.exists() and run_quietly([python, "-m", "pip", "--version"]).returncode == 0):
        try:
            venv.create(folder, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "this Python cannot make a virtual environment; on Debian: apt install python3-venv"
            )
    return python


def installed_torch(python: Path) -> str:
    """The version of torch in the environment; "" if there is none."""
    show = "from importlib.metadata import version; print(version('torch'))"
    return run_quietly([python, "-c", show]).stdout.strip()


def install_torch(python: Path, target: str) -> str:
    """Install torch first and alone, so that nothing else decides which build comes."""
    asked = os.environ.get("TORCH", "")
    requirement = asked or tested_version("torch")
    if not asked and sys.platform == "linux" and not has_nvidia_gpu():
        report = run_quietly(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--dry-run",
                "--no-deps",
                "--report",
                "-",
                requirement,
            ]
        )
        packages = cuda_packages(json.loads(report.stdout)) if report.returncode == 0 else []
        if packages:
            print(
                f"no NVIDIA GPU here, and pip would bring {', '.join(packages)}: taking the CPU build"
            )
            install_cpu_build(python, requirement, packages, target)
            return installed_torch(python)
    subprocess.run([python, "-m", "pip", "install", "--no-compile", requirement], check=True)
    return installed_torch(python)


def tested_version(name: str) -> str:
    """The line of constraints.txt for a package, e.g. "torch==2.13.0"."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.split("==")[0] == name)


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and "GPU" in run_quietly([tool, "-L"]).stdout


def cuda_packages(report: dict[str, Any]) -> list[str]:
    """Which CUDA packages an installation would bring, from pip's installation report."""
    needs = [
        need for item in report["install"] for need in item["metadata"].get("requires_dist", [])
    ]
    wanted = [need for need in needs if need.startswith(CUDA_PREFIXES) and "extra ==" not in need]
    return [re.split(r"[^\w.-]", need)[0] for need in wanted]


def install_cpu_build(python: Path, requirement: str, packages: list[str], target: str) -> None:
    """uv knows where PyTorch keeps its CPU builds, so no address need stand here."""
    uv = [
        python,
        "-m",
        "uv",
        "pip",
        "install",
        "--python",
        python,
        "--torch-backend",
        "cpu",
        requirement,
    ]
    if (
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"]).returncode
        or subprocess.run(uv).returncode
    ):
        sys.exit(NO_CPU_BUILD.format(packages=", ".join(packages[:3]), target=target))


def install_plait(python: Path, extras: str, torch_version: str) -> None:
    """Install this checkout in editable mode; torch stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "keep.txt"
        keep.write_text(f"torch=={torch_version}\n")
        tested = Path(folder) / "tested.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        tested.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
        command = [python, "-m", "pip", "install", "--no-compile", "-c", keep, "-c", tested]
        subprocess.run([*command, "-e", f"{ROOT}[{extras}]"], check=True)


def run_quietly(command: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


if __name__ == "__main__":
    main()
