"""Bytes that are not what was written."""

from __future__ import annotations

import numpy as np


def damaged(data: np.ndarray, change: str, draws: np.random.Generator, size: int) -> np.ndarray:
    """Change bytes: "random" ones, `size` of them; one bit "flip"ped; "cut" short; or "grow"n to twice as many."""
    if change == "random":
        return draws.integers(0, 256, size, dtype=np.uint8)
    if change == "cut":
        return data[: draws.integers(data.size)]
    if change == "grow":
        return np.concatenate([data, data])
    assert change == "flip"
    data = data.copy()
    data[draws.integers(data.size)] ^= 1 << draws.integers(8)
    return data
