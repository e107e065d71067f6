"""bfp: block floating point, whole numbers with the exponent of the largest element of their block.

Where few channels are large, put like beside like first: `KSort` permutes the channels of keys by size.

Source: block floating point for the KV cache with channel rearrangement (K-sort), arXiv 2403.20137.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...cuda_kernels.block_ints import dequantise_blocks_into, quantise_blocks_into
from .blocks import Blocked


@dataclass(frozen=True)
class Bfp(Blocked):
    """`bits` with the sign; real bits per element: `bits + 8 / size`. NaN makes its block NaN."""

    name: ClassVar[str] = "bfp"
    bits: int = 4
    size: int = 32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.size < 1:
            raise ValueError(
                f"bfp: bits={self.bits} must be 2 to 8 and size={self.size} at least 1"
            )

    @property
    def code_bits(self) -> int:
        """With the sign."""
        return self.bits

    @property
    def block(self) -> int:
        """`size`."""
        return self.size

    def quantise(self, x: Tensor, head: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
        """Scales are exponents."""
        quantise_blocks_into(x, self.bits, self.size, scales[0], codes)

    def dequantise(
        self, head: np.ndarray, scales: np.ndarray, codes: np.ndarray, x: Tensor
    ) -> None:
        """The inverse."""
        dequantise_blocks_into(scales[0], codes, self.bits, self.size, x)
