"""mxfp8, mxfp6, mxfp4, mxint8: the OCP microscaling formats, blocks of 32 with a power of two.

Scales and codes are torchao's, bit for bit. NaN makes its block NaN, an infinity comes back and zeroes its block. A
scale byte of 0 means 2 ** -127, as the standard has it, both ways; torchao writes such blocks for 2 ** -126.

Source: OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...cuda_kernels.block_floats import MX_BLOCK, dequantise_mx_into, quantise_mx_into
from ...cuda_kernels.block_ints import dequantise_blocks_into, quantise_blocks_into
from ...cuda_kernels.code_rows import KINDS
from ...cuda_kernels.minifloats import MINIFLOATS
from .blocks import Blocked
from .codec import PageLayout
from .places import CodePlaces

RULES = ("floor", "even", "ceil")


@dataclass(frozen=True)
class MxFloat(Blocked):
    """Small floats. Real bits per element: theirs and a quarter.

    `rule` chooses the scale: "floor" is the standard's, and cuts the largest element of many blocks; "even" looks
    whether it would, "ceil" never cuts.
    """

    forms: ClassVar[tuple[str, ...]]
    form: str
    rule: str = "floor"

    def __post_init__(self) -> None:
        if self.form not in self.forms or self.rule not in RULES:
            raise ValueError(
                f"{self.name}: form={self.form} must be one of {', '.join(self.forms)} and rule={self.rule} "
                f"one of {', '.join(RULES)}"
            )

    @property
    def code_bits(self) -> int:
        """Of the element."""
        return MINIFLOATS[self.form].bits

    @property
    def block(self) -> int:
        """32."""
        return MX_BLOCK

    def places(self, layout: PageLayout) -> CodePlaces | None:
        """Scales, codes, of the forms that attention reads."""
        return CodePlaces(self.form, "powers", MX_BLOCK, (1, 0, 0)) if self.form in KINDS else None

    def quantise(self, x: Tensor, head: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
        """Scales are exponents."""
        quantise_mx_into(x, self.form, self.rule, scales[0], codes)

    def dequantise(
        self, head: np.ndarray, scales: np.ndarray, codes: np.ndarray, x: Tensor
    ) -> None:
        """The inverse."""
        dequantise_mx_into(scales[0], codes, self.form, x)


@dataclass(frozen=True)
class MxFp8(MxFloat):
    """Form "e4m3" or "e5m2"."""

    name: ClassVar[str] = "mxfp8"
    forms: ClassVar[tuple[str, ...]] = ("e4m3", "e5m2")
    form: str = "e4m3"


@dataclass(frozen=True)
class MxFp6(MxFloat):
    """Form "e2m3" or "e3m2"."""

    name: ClassVar[str] = "mxfp6"
    forms: ClassVar[tuple[str, ...]] = ("e2m3", "e3m2")
    form: str = "e2m3"


@dataclass(frozen=True)
class MxFp4(MxFloat):
    """Form "e2m1"."""

    name: ClassVar[str] = "mxfp4"
    forms: ClassVar[tuple[str, ...]] = ("e2m1",)
    form: str = "e2m1"


@dataclass(frozen=True)
class MxInt8(Blocked):
    """Multiples of 1/64 of the power of two below the largest element. Real bits per element: 8.25."""

    name: ClassVar[str] = "mxint8"

    @property
    def code_bits(self) -> int:
        """8."""
        return 8

    @property
    def block(self) -> int:
        """32."""
        return MX_BLOCK

    def quantise(self, x: Tensor, head: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
        """Scales are exponents."""
        quantise_blocks_into(x, 8, self.block, scales[0], codes)

    def dequantise(
        self, head: np.ndarray, scales: np.ndarray, codes: np.ndarray, x: Tensor
    ) -> None:
        """The inverse."""
        dequantise_blocks_into(scales[0], codes, 8, self.block, x)
