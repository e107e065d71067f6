"""none: the bytes as they are; bf16: a page of wider numbers cast down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .codec import (
    CodecError,
    PageLayout,
    PageToBytes,
    PageToPage,
    bytes_tensor,
    need_length,
    tensor_bytes,
)


@dataclass(frozen=True)
class Plain(PageToBytes):
    """The bytes as they are in memory."""

    name: ClassVar[str] = "none"
    lossless: ClassVar[bool] = True

    def max_bytes(self, layout: PageLayout) -> int:
        """All of them."""
        return layout.page_bytes

    def sections(self, layout: PageLayout) -> tuple[int, ...]:
        """Page after page."""
        return 0, layout.page_bytes

    def encode(self, page: Tensor) -> np.ndarray:
        """A view of the page."""
        return tensor_bytes(page)

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """A copy."""
        need_length(data, layout.page_bytes, self.name)
        return bytes_tensor(data, layout.dtype).reshape(layout.shape)


@dataclass(frozen=True)
class CastBf16(PageToPage):
    """Rounds a page to bfloat16."""

    name: ClassVar[str] = "bf16"
    lossless: ClassVar[bool] = False

    def layout(self, layout: PageLayout) -> PageLayout:
        """The same shape."""
        if not layout.dtype.is_floating_point:
            raise CodecError(f"bf16 cannot round {layout.dtype}; use none")
        return PageLayout(layout.shape, torch.bfloat16)

    def encode(self, page: Tensor) -> Tensor:
        """Round."""
        return page.to(torch.bfloat16)

    def decode(self, page: Tensor, layout: PageLayout) -> Tensor:
        """Widen."""
        return page.to(layout.dtype)
