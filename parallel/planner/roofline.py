"""The roofline of one kernel: a fixed time, then whichever of compute and memory is slower."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .efficiency import Kernel
from .hardware import Hardware

Array = NDArray[np.float64]


def seconds(
    flops: ArrayLike, moved_bytes: ArrayLike, peak: float, bandwidth: float, kernel: Kernel
) -> Array:
    """Return ``t0 + max(flops / (e_c peak), bytes / (e_m bandwidth))``, element by element.

    Source: roofline (Williams et al. 2009) with the measured shares of `efficiency`.
    """
    compute = np.asarray(flops, float) / (kernel.compute * peak)
    memory = np.asarray(moved_bytes, float) / (kernel.memory * bandwidth)
    return kernel.fixed + np.maximum(compute, memory)


def ridge(part: Hardware, precision: str) -> float:
    """Return the FLOP per byte at which a part turns from memory-bound to compute-bound."""
    return part.peak(precision) / part.memory_bandwidth.value


def as_array(value: Any) -> Array:
    """Return a float array of what may be a number or one number per candidate."""
    return np.asarray(value, float)
