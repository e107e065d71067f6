"""fp8 and int8: eight bits an element and one scale for each token's vector of one head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.scaled_rows import dequantise_rows_into, quantise_rows_into
from .codec import CodecError, InPlace, PageLayout, need_floats
from .places import CodePlaces


@dataclass(frozen=True)
class Scaled(InPlace):
    """Eight-bit codes, then float32 scales; a vector is its codes times its scale.

    Real bits per element: `8 + 32 / head_dim`. A vector of nothing but subnormal numbers becomes zeros.
    """

    lossless: ClassVar[bool] = False
    whole: ClassVar[bool]  # codes are whole numbers, else e4m3

    def max_bytes(self, layout: PageLayout) -> int:
        """A byte an element and four a vector."""
        need_floats(layout, self.name)
        return layout.numel + 4 * layout.vectors

    def sections(self, layout: PageLayout) -> tuple[int, ...]:
        """Codes, scales."""
        return 0, layout.numel, 4 * layout.vectors

    def places(self, layout: PageLayout) -> CodePlaces:
        """Codes, then scales."""
        return CodePlaces("int8" if self.whole else "e4m3", "vector", 0, (0, 1, 1))

    def encode(self, page: Tensor) -> np.ndarray:
        """Scale each vector so that its largest element just fits, and round.

        Raises:
            CodecError: if an element is infinite, not a number, or too large for float32.
        """
        layout = PageLayout.of(page)
        data = np.empty(self.max_bytes(layout), np.uint8)
        x = (page.float() if page.dtype == torch.float64 else page).reshape(-1, page.shape[-1])
        codes, scales = data[: layout.numel].reshape(x.shape), np.empty(layout.vectors, np.float32)
        if not quantise_rows_into(x, self.whole, scales, codes):
            raise CodecError(f"{self.name} cannot code infinities or NaN; use none for this page")
        data[layout.numel :] = scales.view(np.uint8)
        return data

    def fill(self, data: np.ndarray, page: Tensor) -> None:
        """Codes times scales."""
        rows, size = page.view(-1, page.shape[-1]), page.numel()
        scales = data[size:].copy().view(np.float32)
        dequantise_rows_into(scales, data[:size].reshape(rows.shape), self.whole, rows)


@dataclass(frozen=True)
class Fp8(Scaled):
    """E4M3: four bits of exponent, three of mantissa; relative error at most 1/16, but for the smallest."""

    name: ClassVar[str] = "fp8"
    whole: ClassVar[bool] = False


@dataclass(frozen=True)
class Int8(Scaled):
    """Whole numbers from -127 to 127. Error at most 1/254 of a vector's largest element."""

    name: ClassVar[str] = "int8"
    whole: ClassVar[bool] = True
