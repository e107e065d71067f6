"""Bits given where they pay: least weighted error for a total number of bits, exactly.

    minimise  sum w_i 4 ** -b_i   with   sum b_i <= total,  b_i among the choices

A uniform code of b bits has an error of 4 ** -b of its variance, so w is a variance: of a channel (KVTC), or the
squared norm of a layer's key and value projections (KV-AdaQuant).

Source: KVTC (arXiv 2511.01815) allots by this program; KV-AdaQuant (arXiv 2502.15075) by greedy gain, which is not
optimal where choices are uneven.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def allot_bits(weights: Sequence[float], total: float, choices: Sequence[float]) -> list[float]:
    """Choose the bits of each weight by dynamic programming; of equal errors the fewer bits, then the earlier more.

    Args:
        total: bits in all.
        choices: bits that one may have, such as (2, 3, 4, 8); fractions such as 1.58 count exactly.

    Raises:
        ValueError: if even the fewest bits are too many, or a weight is negative or no number.
    """
    sizes = np.asarray(weights, np.float64)
    ladder = sorted(set(choices))
    if not ladder or not np.isfinite(sizes).all() or (sizes < 0).any():
        raise ValueError("allot_bits: needs choices, and weights that are finite and not negative")
    if len(sizes) * ladder[0] > total:
        raise ValueError(
            f"total={total} bits are too few for {len(sizes)} times {ladder[0]}; give more, or a smaller choice"
        )
    parts = [Fraction(str(bits)) for bits in ladder]
    unit = max(part.denominator for part in parts)
    while any((part * unit).denominator > 1 for part in parts):
        unit += 1
    steps = [int(part * unit) for part in parts]
    room = min(int(Fraction(str(total)) * unit), len(sizes) * steps[-1])
    best = np.full(room + 1, np.inf)
    best[0] = 0.0
    chosen = np.zeros((len(sizes), room + 1), np.int32)
    for i, weight in enumerate(sizes):
        tries = np.full((len(steps), room + 1), np.inf)
        for c, step in enumerate(steps):
            if step <= room:
                tries[c, step:] = best[: room + 1 - step] + weight * 4.0 ** -ladder[c]
        chosen[i] = tries.argmin(0)
        best = tries.min(0)
    left = int(best.argmin())
    found: list[float] = []
    for i in range(len(sizes) - 1, -1, -1):
        c = int(chosen[i, left])
        found.append(ladder[c])
        left -= steps[c]
    return found[::-1]
