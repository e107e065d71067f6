"""mx9, mx6, mx4: shared microexponents, which came before OCP's MX and share only the name.

A block of 16 has the exponent of its largest element; each pair of it may have one less.

Source: "With Shared Microexponents, A Little Shifting Goes a Long Way" (arXiv 2302.08007).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...cuda_kernels.block_ints_gpu import MICRO_BLOCK
from ...cuda_kernels.micro_blocks import dequantise_micro_into, quantise_micro_into
from .blocks import Blocked


@dataclass(frozen=True)
class Microexponents(Blocked):
    """A sign and `magnitude` bits; real bits per element: `magnitude + 2`. NaN makes its block NaN."""

    scale_bytes: ClassVar[int] = 2  # exponent, and a bit for each pair
    magnitude: ClassVar[int]

    @property
    def code_bits(self) -> int:
        """With the sign."""
        return self.magnitude + 1

    @property
    def block(self) -> int:
        """16."""
        return MICRO_BLOCK

    def quantise(self, x: Tensor, head: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
        """Exponents, then pairs."""
        quantise_micro_into(x, self.magnitude, scales[0], scales[1], codes)

    def dequantise(
        self, head: np.ndarray, scales: np.ndarray, codes: np.ndarray, x: Tensor
    ) -> None:
        """The inverse."""
        dequantise_micro_into(scales[0], scales[1], codes, self.magnitude, x)


@dataclass(frozen=True)
class Mx9(Microexponents):
    """Seven bits of magnitude."""

    name: ClassVar[str] = "mx9"
    magnitude: ClassVar[int] = 7


@dataclass(frozen=True)
class Mx6(Microexponents):
    """Four bits of magnitude."""

    name: ClassVar[str] = "mx6"
    magnitude: ClassVar[int] = 4


@dataclass(frozen=True)
class Mx4(Microexponents):
    """Two bits of magnitude."""

    name: ClassVar[str] = "mx4"
    magnitude: ClassVar[int] = 2
