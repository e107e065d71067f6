"""Host memory for results."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .vectors import LINE

HUGE = 4 << 20  # bytes from which NumPy asks for huge pages
# bytes; glibc's DEFAULT_MMAP_THRESHOLD_MAX: what is larger it maps and unmaps each time
LARGEST_OF_HEAP = 32 << 20


def room(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Get it uninitialised; much of it from NumPy, in huge pages: faults of small ones cost more than a kernel does.

    It starts where a cache line does: a vector that lies across two lines costs twice.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    keep_heap()
    if n_bytes < HUGE:
        return torch.empty(shape, dtype=dtype)
    rough = np.empty(n_bytes + LINE, np.uint8)
    start = -rough.ctypes.data % LINE
    return torch.from_numpy(rough[start : start + n_bytes]).view(dtype).view(shape)


def room_like(x: Tensor) -> Tensor:
    """Get room for what a contiguous tensor of host memory holds; a small one costs a third of `room`'s time."""
    if x.nbytes >= HUGE:
        return room(x.shape, x.dtype)
    keep_heap()
    return torch.empty_like(x)


@cache
def keep_heap() -> None:
    """Show glibc once that large blocks come and go: it then keeps up to twice as much of free heap.

    Left to itself it keeps twice the largest block that was freed so far. Two results of one size are at that edge:
    freed together they may go back to the system, and each call faults them in anew, a page at a time.
    """
    np.empty(LARGEST_OF_HEAP - (64 << 10), np.uint8)
