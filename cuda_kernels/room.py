"""Host memory for results."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

HUGE = 4 << 20  # bytes from which NumPy asks for huge pages


def room(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Get it uninitialised; much of it from NumPy, in huge pages: faults of small ones cost more than a kernel does."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < HUGE:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(n_bytes, np.uint8)).view(dtype).view(shape)
