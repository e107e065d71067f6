"""Host memory for results."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

HUGE = 4 << 20  # bytes from which NumPy asks for huge pages
LINE = 64  # bytes of a cache line


def room(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Get it uninitialised; much of it from NumPy, in huge pages: faults of small ones cost more than a kernel does.

    It starts where a cache line does: a vector that lies across two lines costs twice.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < HUGE:
        return torch.empty(shape, dtype=dtype)
    rough = np.empty(n_bytes + LINE, np.uint8)
    start = -rough.ctypes.data % LINE
    return torch.from_numpy(rough[start : start + n_bytes]).view(dtype).view(shape)
