"""Make .venv-cuda: what compiles the CUDA kernels without a GPU, for the check of their machine code.

The kernels' own toolchain (the `cuda` extra) with ptxas of the same toolkit and the disassembler, pinned: the table
that the check compares with is theirs. `make check-cuda` calls this.
"""

from __future__ import annotations

import subprocess
import sys

from install import ROOT, install_torch, installed_torch, make_venv, tested_version

# cuobjdump and nvdisasm exist from 13.2 on, and read what ptxas 13.0 wrote
TOOLS = [
    "numba-cuda==0.30.4",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-cuobjdump==13.5.37",
    "nvidia-cuda-nvdisasm==13.5.37",
]
NOT_INSTALLED = """
#####################################################################################
##  The CUDA compiler's wheels could not be installed (see above).
##  The machine code of the CUDA kernels was NOT checked.
#####################################################################################
"""


def main() -> None:
    python = make_venv(ROOT / ".venv-cuda")
    if not installed_torch(python):
        install_torch(python, "check-cuda")
    pinned = [tested_version(name) for name in ("numba", "numpy", "pytest")]
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    if subprocess.run([*command, *TOOLS, *pinned, "-e", f"{ROOT}[cuda]"]).returncode:
        print(NOT_INSTALLED, file=sys.stderr)
        sys.exit(3)
    print("the CUDA compiler is installed in .venv-cuda")


if __name__ == "__main__":
    main()
