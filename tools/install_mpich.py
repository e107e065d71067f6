"""Make .venv-mpich: .venv with MPICH in the place of Open MPI, for the tests of the mpi backend.

Both wheels bring an mpirun and a libmpi of the same names, so they cannot share an environment. This one holds mpi4py
and MPICH by itself and finds everything else in .venv. `make test-mpich` calls this.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from install import ROOT, make_venv, tested_version

MPICH = "mpich>=5.0"
NOT_INSTALLED = """
#####################################################################################
##  MPICH could not be installed (see above).
##  The mpi backend was NOT tested with it.
#####################################################################################
"""


def main() -> None:
    python = make_venv(ROOT / ".venv-mpich")
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    if subprocess.run([*command, MPICH, tested_version("mpi4py")]).returncode:
        print(NOT_INSTALLED, file=sys.stderr)
        sys.exit(3)
    # after its own: what lies there comes first
    (packages_of(python) / "zz_everything_else.pth").write_text(
        f"import site; site.addsitedir({str(packages_of(ROOT / '.venv/bin/python'))!r})\n"
    )
    print("MPICH is installed in .venv-mpich")


def packages_of(python: Path) -> Path:
    """Find where an environment keeps its packages."""
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", show], capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
