"""What stands in the way of CUDA kernels, and the line to type: found before, and said at the first call."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from plait.cuda_kernels.gpu import launch, toolchain
from plait.cuda_kernels.gpu.toolchain import INSTALL, CudaToolchainError, version_problem
from plait.cuda_kernels.merge import merge_rows


class Machine:
    """A machine with all that is needed; tests take something away."""

    def __init__(self) -> None:
        self.packages = {"numba-cuda": "0.30.4", "nvidia-nvvm": "13.0.88"}
        self.modules: dict[str, Any] = {
            "numba.cuda": SimpleNamespace(implementation="NVIDIA"),
            "numba.cuda.cudadrv.nvvm": SimpleNamespace(NVVM=lambda: None),
            "numba.cuda.cudadrv.nvrtc": SimpleNamespace(get_supported_ccs=lambda: None),
            "cuda.bindings.nvrtc": SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)),
            "cuda.bindings.driver": SimpleNamespace(cuDriverGetVersion=lambda: (0, 13000)),
            "cuda.core": SimpleNamespace(),
        }

    def version(self, name: str) -> str:
        if name not in self.packages:
            raise PackageNotFoundError(name)
        return self.packages[name]

    def load(self, name: str) -> Any:
        if name not in self.modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return self.modules[name]

    def refuse(self, name: str, attribute: str, error: Exception) -> None:
        def call() -> None:
            raise error

        self.modules[name] = SimpleNamespace(**{attribute: call})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine without faults, as the toolchain sees it."""
    made = Machine()
    monkeypatch.setattr(toolchain, "version", made.version)
    monkeypatch.setattr(toolchain, "import_module", made.load)
    toolchain.problem.cache_clear()
    toolchain.usable.cache_clear()
    yield made
    toolchain.problem.cache_clear()
    toolchain.usable.cache_clear()


def test_nothing_is_missing(machine: Machine) -> None:
    assert toolchain.problem() is None
    assert toolchain.usable()


def lacks_numba_cuda(machine: Machine) -> None:
    del machine.packages["numba-cuda"]


def has_only_the_successor(machine: Machine) -> None:
    del machine.packages["numba-cuda"]
    machine.packages["numba-cuda-mlir"] = "0.6.0"


def has_the_built_in_target(machine: Machine) -> None:
    machine.modules["numba.cuda"] = SimpleNamespace()


def lacks_libnvvm(machine: Machine) -> None:
    machine.refuse("numba.cuda.cudadrv.nvvm", "NVVM", OSError("libnvvm.so: not found\nlong story"))


def lacks_nvrtc(machine: Machine) -> None:
    machine.refuse("numba.cuda.cudadrv.nvrtc", "get_supported_ccs", RuntimeError(""))


def has_an_old_toolkit(machine: Machine) -> None:
    machine.modules["cuda.bindings.nvrtc"] = SimpleNamespace(nvrtcVersion=lambda: (0, 12, 4))


def lacks_cuda_core(machine: Machine) -> None:
    del machine.modules["cuda.core"]


def lacks_a_driver(machine: Machine) -> None:
    machine.refuse("cuda.bindings.driver", "cuDriverGetVersion", RuntimeError("libcuda.so.1"))


def has_an_old_driver(machine: Machine) -> None:
    machine.modules["cuda.bindings.driver"] = SimpleNamespace(cuDriverGetVersion=lambda: (0, 12080))


def has_a_compiler_beyond_its_driver(machine: Machine) -> None:
    machine.packages["nvidia-nvvm"] = "13.2.51"


@pytest.mark.parametrize(
    ("fault", "what", "remedy"),
    [
        (lacks_numba_cuda, "numba-cuda is not installed", INSTALL),
        (has_only_the_successor, "numba-cuda-mlir 0.6.0 is, which does not", INSTALL),
        (has_the_built_in_target, "built-in CUDA target is in use", toolchain.REINSTALL),
        (lacks_libnvvm, "libnvvm cannot be loaded (libnvvm.so: not found)", INSTALL),
        (lacks_nvrtc, "libnvrtc cannot be loaded (RuntimeError)", INSTALL),
        (has_an_old_toolkit, "the toolkit is CUDA 12.4", f"{INSTALL}, and unset CUDA_HOME"),
        (lacks_cuda_core, "cuda-python cannot be loaded", INSTALL),
        (lacks_a_driver, "no CUDA driver (libcuda.so.1)", toolchain.DRIVER),
        (has_an_old_driver, "the driver is for CUDA 12.8; plait needs 13.0", toolchain.DRIVER),
        (has_a_compiler_beyond_its_driver, "libnvvm 13.2 writes PTX", "pip install 'nvidia-nvvm==13.0.*'"),
    ],
)  # fmt: skip
def test_the_line_to_type(machine: Machine, fault: Any, what: str, remedy: str) -> None:
    fault(machine)
    found = toolchain.problem()
    assert found is not None
    assert what in found.what
    assert found.remedy.startswith(remedy)
    with pytest.warns(UserWarning, match="plait runs without its CUDA kernels, slower"):
        assert not toolchain.usable()
    variant = merge_rows(**{**merge_rows.table[0]})
    with pytest.raises(CudaToolchainError, match="cannot be used") as caught:
        launch.load(variant, 0)
    assert remedy in str(caught.value)


def test_a_newer_driver_takes_older_code() -> None:
    assert version_problem((13, 2), (13, 0)) is None
    assert version_problem((13, 0), None) is None
