"""What compiling and running CUDA kernels needs, and the line that adds what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

INSTALL = "pip install 'plait[cuda]'"
OLDEST_DRIVER = OLDEST_TOOLKIT = (13, 0)
DRIVER = "install NVIDIA's driver 580 or newer"
REINSTALL = "pip install --force-reinstall 'plait[cuda]'"


class CudaToolchainError(RuntimeError):
    """CUDA kernels cannot be compiled or loaded here; the message says what would do."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what mends it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; type: {self.remedy}"


def compiler_problem() -> Problem | None:
    """Look for what compiling needs: numba-cuda itself, libnvvm and NVRTC. Needs no GPU."""
    if _installed("numba-cuda") is None:
        other = _installed("numba-cuda-mlir")
        beside = (
            f"; numba-cuda-mlir {other} is, which does not compile these kernels" if other else ""
        )
        return Problem(f"numba-cuda is not installed{beside}", INSTALL)
    if getattr(import_module("numba.cuda"), "implementation", "Built-in") != "NVIDIA":
        return Problem(
            "numba's built-in CUDA target is in use although numba-cuda is installed (its .pth file runs only in a "
            "site directory: not with pip --target and PYTHONPATH)",
            REINSTALL,
        )
    parts = (
        ("libnvvm", import_module("numba.cuda.cudadrv.nvvm").NVVM),
        ("libnvrtc", import_module("numba.cuda.cudadrv.nvrtc").get_supported_ccs),
    )
    for name, touch in parts:
        try:
            touch()
        except Exception as error:
            return Problem(
                f"{name} cannot be loaded ({_first(error)})", f"{INSTALL}, or set CUDA_HOME"
            )
    try:
        _, *found = import_module("cuda.bindings.nvrtc").nvrtcVersion()
        import_module("cuda.core")
    except Exception as error:
        return Problem(f"cuda-python cannot be loaded ({_first(error)})", INSTALL)
    return toolkit_problem((found[0], found[1]))


def _installed(name: str) -> str | None:
    """The version of an installed package; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def toolkit_problem(found: tuple[int, int]) -> Problem | None:
    """A toolkit of CUDA 12 knows neither all our instructions nor all devices; CUDA_HOME may point to one."""
    if found < OLDEST_TOOLKIT:
        return Problem(
            f"the toolkit is CUDA {found[0]}.{found[1]}; plait needs 13.0",
            f"{INSTALL}, and unset CUDA_HOME",
        )
    return None


def driver_problem() -> Problem | None:
    """Look for a driver that takes what the compiler writes."""
    try:
        _, number = import_module("cuda.bindings.driver").cuDriverGetVersion()
    except ModuleNotFoundError as error:
        return Problem(f"cuda-python cannot be loaded ({_first(error)})", INSTALL)
    except Exception as error:
        return Problem(f"no CUDA driver ({_first(error)})", DRIVER)
    if not number:
        return Problem("no CUDA driver", DRIVER)
    return version_problem((number // 1000, number % 1000 // 10), _nvvm_version())


def _first(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def version_problem(driver: tuple[int, int], compiler: tuple[int, int] | None) -> Problem | None:
    """A driver takes PTX of its own toolkit's version and older."""
    told = f"the driver is for CUDA {driver[0]}.{driver[1]}"
    if driver < OLDEST_DRIVER:
        return Problem(f"{told}; plait needs 13.0", DRIVER)
    if compiler is not None and compiler > driver:
        return Problem(
            f"libnvvm {compiler[0]}.{compiler[1]} writes PTX that is too new: {told}",
            "pip install 'nvidia-nvvm==13.0.*'",
        )
    return None


def _nvvm_version() -> tuple[int, int] | None:
    """The toolkit version of the libnvvm that pip installed; None: from elsewhere."""
    found = _installed("nvidia-nvvm")
    if found is None:
        return None
    major, minor = found.split(".")[:2]
    return int(major), int(minor)


CHECKS: tuple[Callable[[], Problem | None], ...] = (compiler_problem, driver_problem)


@lru_cache(maxsize=1)
def problem() -> Problem | None:
    """The first thing that stands in the way of CUDA kernels; None: nothing."""
    return next((found for check in CHECKS if (found := check())), None)


def require() -> None:
    """Go on, or say what is missing.

    Raises:
        CudaToolchainError: with the line to type.
    """
    found = problem()
    if found is not None:
        raise CudaToolchainError(f"plait's CUDA kernels cannot be used: {found}")


@lru_cache(maxsize=1)
def usable() -> bool:
    """Say whether CUDA kernels can be used; when not, warn once: the operators then run torch's operations."""
    found = problem()
    if found is not None:
        warnings.warn(f"plait runs without its CUDA kernels, slower: {found}", stacklevel=3)
    return found is None
