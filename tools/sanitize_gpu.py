"""Run the GPU tests of kernels under compute-sanitizer: memcheck, then racecheck. `make sanitize-gpu` calls this.

Where there is no CUDA device or no compute-sanitizer it says so and ends well: nothing was checked. Tests of several
processes and of a million steps are left out, for the tool slows kernels a hundredfold.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
TESTS = [
    "tests/cuda_kernels",
    "-m",
    "gpu and not slow",
    "-k",
    "not two_processes and not toolchain and not torch_compile",
    "-o",
    "faulthandler_timeout=3600",
]
FAULT = 86  # what compute-sanitizer ends with when it has found one


def main() -> int:
    found = sanitizer()
    if not torch.cuda.is_available():
        return skip("there is no CUDA device")
    if found is None:
        return skip(
            "there is no compute-sanitizer; install the CUDA toolkit, or put its bin folder in PATH"
        )
    for name in TOOLS:
        command = [
            found,
            "--tool",
            name,
            "--error-exitcode",
            str(FAULT),
            "--target-processes",
            "all",
        ]
        done = subprocess.run([*command, sys.executable, "-m", "pytest", *TESTS], cwd=ROOT)
        if done.returncode:
            said = "found faults" if done.returncode == FAULT else "could not run the tests"
            print(f"{name} {said} (exit {done.returncode})", file=sys.stderr)
            return 1
        print(f"{name}: clean")
    return 0


def skip(why: str) -> int:
    print(f"SKIPPED, nothing was checked: {why}")
    return 0


def sanitizer() -> str | None:
    """Find the tool in PATH, or where CUDA's wheels and its installer put it."""
    places = [
        Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin",
        Path("/usr/local/cuda/bin"),
    ]
    there = [str(place / "compute-sanitizer") for place in places]
    return shutil.which("compute-sanitizer") or next((p for p in there if Path(p).exists()), None)


if __name__ == "__main__":
    sys.exit(main())
