"""fp8 and int8: eight bits an element and one scale for each token's vector of one head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .codec import CodecError, PageLayout, PageToBytes, bytes_tensor, need_length, tensor_bytes


@dataclass(frozen=True)
class Scaled(PageToBytes):
    """Eight-bit codes, then float32 scales; a vector is its codes times its scale.

    Real bits per element: `8 + 32 / head_dim`.
    """

    lossless: ClassVar[bool] = False
    largest: ClassVar[float]  # code that the largest element of a vector gets

    @abstractmethod
    def codes(self, scaled: Tensor) -> Tensor:
        """Round float32 within [-largest, largest] to eight bits, elementwise."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """Read eight-bit codes (as uint8) as float32."""

    def max_bytes(self, layout: PageLayout) -> int:
        """A byte an element and four a vector."""
        if not layout.dtype.is_floating_point or not layout.shape:
            raise CodecError(
                f"{self.name} cannot code a page {list(layout.shape)} of {layout.dtype}; use none"
            )
        return layout.numel + 4 * (layout.numel // layout.shape[-1])

    def encode(self, page: Tensor) -> np.ndarray:
        """Scale each vector so that its largest element just fits, and round.

        Raises:
            CodecError: if an element is infinite, not a number, or too large for float32.
        """
        rows = page.reshape(-1, page.shape[-1]).float()
        top = rows.abs().amax(1, keepdim=True)
        if not bool(top.isfinite().all()):
            raise CodecError(f"{self.name} cannot code infinities or NaN; use none for this page")
        # A vector of nothing but subnormals may have no scale that float32 can divide by: it becomes zeros.
        scale = top / self.largest
        inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0)
        codes = self.codes((rows * inverse).clamp(-self.largest, self.largest))
        return np.concatenate([tensor_bytes(codes), tensor_bytes(scale.flatten())])

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Codes times scales."""
        need_length(data, self.max_bytes(layout), self.name)
        codes = bytes_tensor(data[: layout.numel], torch.uint8).reshape(-1, layout.shape[-1])
        scale = bytes_tensor(data[layout.numel :], torch.float32)[:, None]
        return (self.values(codes) * scale).to(layout.dtype).reshape(layout.shape)


@dataclass(frozen=True)
class Fp8(Scaled):
    """E4M3: four bits of exponent, three of mantissa; relative error at most 1/16, but for the smallest."""

    name: ClassVar[str] = "fp8"
    largest: ClassVar[float] = 448.0

    def codes(self, scaled: Tensor) -> Tensor:
        """Round to the nearest."""
        return scaled.to(torch.float8_e4m3fn)

    def values(self, codes: Tensor) -> Tensor:
        """Widen."""
        return codes.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Int8(Scaled):
    """Whole numbers from -127 to 127. Error at most 1/254 of a vector's largest element."""

    name: ClassVar[str] = "int8"
    largest: ClassVar[float] = 127.0

    def codes(self, scaled: Tensor) -> Tensor:
        """Round to the nearest."""
        return scaled.round().to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """Widen."""
        return codes.view(torch.int8).float()
