"""A kernel and its variants: what is compiled, simulated, checked and launched.

@kernel(threads=128, table=[{"width": 128}])
def scale_rows(width, threads):              # constants: each set of them is one compiled variant
    def body(x: u64, rows: i32):             # the arguments of the launch; never more than a few
        ...
    return body

scale_rows(width=128).launch(grid, x.data_ptr(), rows)      # on torch's current stream
scale_rows(width=128).simulate(grid, x.data_ptr(), rows)    # in Python, x on the CPU
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from . import simulator
from .launch import Loaded, load
from .ptx.words import TYPES

KERNELS: dict[str, Kernel] = {}


class Kernel:
    """A kernel for any constants.

    Attributes:
        build: gives the body for some constants and the number of threads of a block.
        threads: of a block, unless the constants say another number.
        table: the constants that the compile-only check compiles, and the architectures if not all.
    """

    def __init__(self, build: Callable[..., Any], threads: int, table: Sequence[dict[str, Any]]):
        self.name, self.build, self.threads, self.table = build.__name__, build, threads, table
        self._variants: dict[tuple[Any, ...], Variant] = {}

    def __call__(self, **constants: Any) -> Variant:
        """Give the variant for these constants, the same one each time."""
        key = tuple(constants.items())
        found = self._variants.get(key)
        if found is None:
            threads = constants.pop("threads", self.threads)
            found = self._variants[key] = Variant(self, constants, threads)
        return found


class Variant:
    """A kernel for given constants."""

    def __init__(self, kernel: Kernel, constants: dict[str, Any], threads: int) -> None:
        self.kernel, self.constants, self.threads = kernel, constants, threads
        self.body = kernel.build(**constants, threads=threads)
        given = inspect.signature(self.body).parameters.values()
        self.arguments = tuple(_type_name(parameter.annotation) for parameter in given)
        self._loaded: dict[int, Loaded] = {}

    @cached_property
    def name(self) -> str:
        told = " ".join(f"{key}={_short(value)}" for key, value in self.constants.items())
        return f"{self.kernel.name} {told} threads={self.threads}"

    @property
    def whole_name(self) -> str:
        """Everything that tells it from other variants: `name` is for people, and shortens."""
        return (
            f"{self.kernel.build.__module__} {self.kernel.name} {self.constants!r} {self.threads}"
        )

    def launch(self, grid: int | tuple[int, ...], *args: float) -> None:
        """Start it on torch's current device and stream; compiles at the first call on a device."""
        device = torch.cuda.current_device()
        loaded = self._loaded.get(device)
        if loaded is None:
            loaded = self._loaded[device] = load(self, device)
        loaded.launch(grid, args)

    def simulate(self, grid: int | tuple[int, ...], *args: float, **options: Any) -> None:
        """Run it in Python on addresses of this process; `options` as in `simulator.run`."""
        given = [TYPES[name](value) for name, value in zip(self.arguments, args, strict=True)]
        simulator.run(self.body, grid, self.threads, *given, **options)

    def to_ptx(self, arch: tuple[int, int]) -> str:
        """Compile to PTX for a compute capability; needs numba-cuda and libnvvm, but no GPU."""
        from .numba_cuda import compile_to_ptx

        return compile_to_ptx(self.body, self.arguments, arch, self.threads)


def run_on(launch: Sequence[Any], near: torch.Tensor) -> None:
    """Start variant, grid and arguments on the device of a tensor, whichever is current."""
    variant, grid, args = launch
    with torch.cuda.device_of(near):
        variant.launch(grid, *args)


def kernel(
    *, threads: int, table: Sequence[dict[str, Any]]
) -> Callable[[Callable[..., Any]], Kernel]:
    """Register a function that builds kernel bodies; `table` lists variants for the compile-only check."""

    def register(build: Callable[..., Any]) -> Kernel:
        made = KERNELS[build.__name__] = Kernel(build, threads, table)
        return made

    return register


def _type_name(annotation: Any) -> str:
    """Read "u64" or `u64` as "u64"."""
    return next(name for name, kind in TYPES.items() if annotation in (name, kind))


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")
