"""Columns: the planner's arrays, one number per candidate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def as_array(value: Any) -> Array:
    """Return a float array of what may be a number or one number per candidate."""
    return np.asarray(value, float)
