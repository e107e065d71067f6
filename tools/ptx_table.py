"""Compile every registered CUDA kernel without a GPU and print what ptxas made of it; `make check-cuda` calls this.

A kernel with a spill, a stack frame, a float64, a call or a generic access is refused. The rest is a table: registers,
16-byte loads and stores, multicast and tensor-core instructions, bytes of shared memory; tests pin it.

    python tools/ptx_table.py                      print it
    python tools/ptx_table.py --write              after a change that is meant: renew the pinned table
    python tools/ptx_table.py merge_rows --write   or one kernel's rows of it
    python tools/ptx_table.py merge_rows --sass    one kernel, with its machine code
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plait.cuda_kernels
from plait.cuda_kernels.gpu.kernel import KERNELS, Variant
from plait.cuda_kernels.gpu.toolchain import compiler_problem

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "tests" / "cuda_kernels" / "ptx_table.txt"
ARCHITECTURES = ((8, 0), (9, 0), (10, 0))
HEAD = f"{'kernel':72} {'arch':>5} {'regs':>4} {'ld16':>4} {'st16':>4} {'mcast':>5} {'mma':>4} {'shared':>6}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kernels", nargs="*", help="names; all without")
    parser.add_argument("--write", action="store_true", help="renew the pinned table")
    parser.add_argument("--sass", action="store_true", help="print the machine code too")
    options = parser.parse_args()
    problem = compiler_problem()
    if problem or not tool("ptxas"):
        print(problem or "no ptxas; type: make .venv-cuda/.ready", file=sys.stderr)
        return 3
    rows, faults = [], []
    for variant, arch in chosen(options.kernels):
        made = Assembled(variant, arch)
        rows.append(made.row())
        print(rows[-1], flush=True)
        faults += made.faults()
        if options.sass:
            print(made.sass)
    for fault in faults:
        print("REFUSED:", fault, file=sys.stderr)
    if options.write and not faults:
        kept = PINNED.read_text().splitlines()[1:] if options.kernels else []
        rows += [row for row in kept if row.split()[0] not in options.kernels]
        PINNED.write_text("\n".join([HEAD, *sorted(rows)]) + "\n")
    return 1 if faults else 0


def import_kernels() -> None:
    """Import every file of the package: kernels register themselves."""
    for found in pkgutil.iter_modules(plait.cuda_kernels.__path__):
        importlib.import_module(f"plait.cuda_kernels.{found.name}")


def chosen(names: list[str]) -> Iterator[tuple[Variant, tuple[int, int]]]:
    """Give the first variant of each table with each architecture, the others with sm_90: each takes seconds."""
    import_kernels()
    for name, kernel in sorted(KERNELS.items()):
        if names and name not in names:
            continue
        for place, entry in enumerate(kernel.table):
            constants = dict(entry)
            oldest, newest = constants.pop("arch", 80), constants.pop("newest", 100)
            for arch in ARCHITECTURES:
                fits = oldest <= arch[0] * 10 + arch[1] <= newest
                if fits and (place == 0 or arch == (9, 0)):
                    yield kernel(**constants), arch


def tool(name: str) -> str | None:
    beside = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    return str(beside) if beside.exists() else shutil.which(name)


class Assembled:
    """A variant's PTX and machine code, and what stands in them."""

    def __init__(self, variant: Variant, arch: tuple[int, int]) -> None:
        self.variant, self.arch = variant, f"sm_{arch[0]}{arch[1]}"
        self.ptx = variant.to_ptx(arch)
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(self.ptx)
            said = call(tool("ptxas"), f"-arch={self.arch}", "-v", source, "-o", cubin)
            self.sass = call(tool("cuobjdump"), "-sass", cubin) if tool("cuobjdump") else ""
        self.registers = number(r"Used (\d+) registers", said)
        self.shared = number(r"(\d+) bytes smem", said)
        self.spills = number(r"(\d+) bytes spill stores", said)
        self.frame = number(r"(\d+) bytes stack frame", said)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    def row(self) -> str:
        loads, stores = self.count(r"\bLDG\S*\.128\b"), self.count(r"\bSTG\S*\.128\b")
        mcast, mma = len(re.findall(r"\bmultimem\.", self.ptx)), self.count(r"\bHMMA\b")
        told = f"{self.registers:4} {loads:4} {stores:4} {mcast:5} {mma:4} {self.shared:6}"
        return f"{self.variant.name:72} {self.arch:>5} {told}"

    def faults(self) -> list[str]:
        """What no kernel of ours may have."""
        where = f"{self.variant.name} for {self.arch}"
        found = {
            "spills registers": self.spills > 0,
            "has a stack frame (a local array with an index that is not constant?)": self.frame > 0,
            "computes in float64 (a literal without f32()?)": ".f64" in self.ptx,
            "calls a function (// or % of integers?)": self.calls(),
            "uses generic addresses (a numba array?)": self.count(r"\b(?:LD|ST)\.E\b") > 0,
        }
        return [f"{where} {what}" for what, breach in found.items() if breach]

    def calls(self) -> bool:
        """Calls, and what ptxas makes a call of. Shuffles and barriers have one of ptxas' own, for diverged warps."""
        asked = re.search(r"\bcall\b|\b(div|rem)\.[su]\d\d\b|\b(div|sqrt)\.rn\b", self.ptx)
        return bool(asked) or (self.count(r"\bCALL\b") > 0 and ".sync" not in self.ptx)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def call(*command: Any) -> str:
    path = (
        f"{Path(str(command[0])).parent}{os.pathsep}{os.environ['PATH']}"  # cuobjdump runs nvdisasm
    )
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
