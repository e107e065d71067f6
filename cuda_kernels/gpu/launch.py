"""Load compiled kernels with cuda.core and launch them on torch's current stream.

The arguments are numbers: `tensor.data_ptr()`, sizes, and the address of a table in device memory where one launch
needs many pointers (a table belongs to what lives long, a communicator's buffers, so that no launch copies one).
Works inside `torch.cuda.graph` once the kernel has run outside of it: a launch neither allocates nor waits.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from .ptx.words import TYPES
from .ptx_cache import compiled
from .toolchain import CudaToolchainError, require

if TYPE_CHECKING:
    from .kernel import Variant


class Loaded:
    """A variant on a device."""

    def __init__(self, handle: Any, arguments: tuple[str, ...], threads: int) -> None:
        self.handle, self.threads = handle, threads
        self.types = [TYPES[name] for name in arguments]

    def launch(self, grid: int | tuple[int, ...], args: tuple[float, ...]) -> None:
        stream = _stream(torch.cuda.current_stream().cuda_stream)  # asked at each call
        given = [make(value) for make, value in zip(self.types, args, strict=True)]
        _core().launch(stream, _config(grid, self.threads), self.handle, *given)


def load(variant: Variant, device: int) -> Loaded:
    """Compile a variant for a device and load it.

    Raises:
        CudaToolchainError: what is missing or too old, and the line that mends it; or a graph is being captured.
    """
    require()
    if torch.cuda.is_current_stream_capturing():
        raise CudaToolchainError(
            f"{variant.name} is compiled at its first call, which cannot be inside a CUDA graph capture; "
            "call it once before capturing"
        )
    _core().Device(device).set_current()
    arch = torch.cuda.get_device_capability(device)
    text = compiled(variant.whole_name, arch, lambda: variant.to_ptx(arch))
    entry = re.search(r"\.visible \.entry (\w+)", text)
    assert entry is not None
    handle = (
        _core().ObjectCode.from_ptx(text.encode(), name=variant.name).get_kernel(entry.group(1))
    )
    return Loaded(handle, variant.arguments, variant.threads)


@lru_cache(maxsize=1)
def _core() -> Any:
    return import_module("cuda.core")


@lru_cache(maxsize=256)
def _config(grid: int | tuple[int, ...], threads: int) -> Any:
    return _core().LaunchConfig(grid=grid, block=threads)


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    """Wrap a stream's handle; which stream is current is asked at every launch."""
    return _core().Stream.from_handle(handle)
