"""Every registered CUDA kernel compiles without a GPU to the machine code that the pinned table describes.

After a change that is meant: `.venv-cuda/bin/python tools/ptx_table.py --write`, and read the difference.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """Give tools/ptx_table.py, if this environment has what it needs."""
    try:
        version("numba-cuda")
    except PackageNotFoundError:
        pytest.skip("no numba-cuda in this environment; make check-cuda runs this")
    spec = importlib.util.spec_from_file_location("ptx_table", TOOLS / "ptx_table.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["ptx_table"] = found
    spec.loader.exec_module(found)
    if not all(found.tool(name) for name in ("ptxas", "cuobjdump")):
        pytest.skip("no ptxas and cuobjdump in this environment; make check-cuda runs this")
    return found


def test_the_table_is_what_is_pinned(table: ModuleType) -> None:
    made = [table.Assembled(variant, arch) for variant, arch in table.chosen([])]
    assert [fault for one in made for fault in one.faults()] == []
    assert [table.HEAD, *sorted(one.row() for one in made)] == table.PINNED.read_text().splitlines()


def doubles(threads):
    from plait.cuda_kernels.gpu import ptx
    from plait.cuda_kernels.gpu.ptx import u64

    def body(x: u64):
        ptx.st_f32(x, ptx.ld_f32(x) * 0.3)

    return body


def divides(threads):
    from plait.cuda_kernels.gpu import ptx
    from plait.cuda_kernels.gpu.ptx import i32, u32, u64

    def body(x: u64, n: i32):
        ptx.st4(x, u32(ptx.thread() // n))

    return body


def spills(threads):
    from plait.cuda_kernels.gpu import ptx
    from plait.cuda_kernels.gpu.ptx import f32, i32, u64

    def body(x: u64):
        kept, total = ptx.local(512, f32), f32(0)
        for i in range(512):
            kept[i] = ptx.ld_f32(x + u64(4 * i))
        kept[ptx.thread() & i32(511)] = f32(1)
        for i in range(512):
            total = f32(total * kept[i] + f32(1))
        ptx.st_f32(x, total)

    return body


@pytest.mark.parametrize(
    ("build", "complaint"),
    [(doubles, "float64"), (divides, "calls a function"), (spills, "stack frame")],
)
def test_the_check_sees_what_it_forbids(table: ModuleType, build, complaint: str) -> None:
    from plait.cuda_kernels.gpu.kernel import Kernel

    made = table.Assembled(Kernel(build, 64, [])(), (9, 0))
    assert any(complaint in fault for fault in made.faults())
