"""Make .venv-oracles, and what kvpress, torchao and ml_dtypes say in it: is it still what the tests compare with?

The tests read it from files (`*.safetensors` beside the scripts below), so they need none of these packages. kvpress
asks for an older transformers than constraints.txt has. `make oracles` calls this.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from install import ROOT, install_torch, installed_torch, make_venv

SCRIPTS = ("tests/kvstore/compress/kvpress_scores.py", "tests/kvstore/mx_oracle.py")
WANTED = ("kvpress==0.5.5", "transformers==5.2.0", "safetensors", "ml_dtypes==0.5.4")
ALONE = ("torchao==0.18.0",)  # its dependencies are there, in versions of others' choice
NOT_RUN = """
#####################################################################################
##  The oracles did NOT run: {what}.
##  The tests compare with what they said when their files were made.
#####################################################################################
"""
FAILED = 3


def main() -> None:
    python = Path(sys.argv[1]) if len(sys.argv) > 1 else environment()
    different = [script for script in SCRIPTS if not same(python, ROOT / script)]
    if different:
        sys.exit(f"{', '.join(different)}: the file beside it says something else, see git diff")
    print("kvpress, torchao and ml_dtypes say, bit for bit, what the tests compare with")


def environment() -> Path:
    """The environment's Python, with all that is wanted in it."""
    python = make_venv(ROOT / ".venv-oracles")
    torch = f"torch=={installed_torch(python) or install_torch(python, 'oracles')}"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    for wanted in ([*WANTED, torch], ["--no-deps", *ALONE]):
        if subprocess.run([*pip, *wanted]).returncode:
            stop(f"{' '.join(wanted)} could not be installed")
    return python


def same(python: Path, script: Path) -> bool:
    """Run a script; say whether its file is, byte for byte, the one in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        if subprocess.run([python, script, made]).returncode:
            stop(f"{script.name} failed")
        known = script.with_suffix(".safetensors")
        if made.read_bytes() == known.read_bytes():
            return True
        known.write_bytes(made.read_bytes())
        return False


def stop(what: str) -> None:
    """End with a message nobody overlooks."""
    print(NOT_RUN.format(what=what), file=sys.stderr)
    sys.exit(FAILED)


if __name__ == "__main__":
    main()
