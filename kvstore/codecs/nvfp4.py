"""nvfp4: four-bit floats in blocks of 16 with a scale of eight bits, and one of 32 for the page.

Scales and codes are torchao's, bit for bit, with the page's own largest element. `four=True` also tries, for each
block, a scale that makes its largest element 4 instead of 6, and keeps the better: steps between 4 and 6 are coarse.

Source: NVFP4 (NVIDIA Blackwell); "Four over six" (arXiv 2512.02010).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...cuda_kernels.nvfp4 import (
    NVFP4_BLOCK,
    dequantise_nvfp4_into,
    nvfp4_whole,
    quantise_nvfp4_into,
)
from .blocks import Blocked
from .codec import CodecError, PageLayout
from .places import CodePlaces


@dataclass(frozen=True)
class Nvfp4(Blocked):
    """Real bits per element: 4.5, and four bytes a page. Vectors of a page share a scale: it is coded as a whole."""

    name: ClassVar[str] = "nvfp4"
    head_bytes: ClassVar[int] = 4
    four: bool = False

    @property
    def code_bits(self) -> int:
        """4."""
        return 4

    @property
    def block(self) -> int:
        """16."""
        return NVFP4_BLOCK

    def places(self, layout: PageLayout) -> CodePlaces:
        """Scales, codes; the head is the pages' scale."""
        return CodePlaces("e2m1", "e4m3", NVFP4_BLOCK, (1, 0, 0))

    def quantise(self, x: Tensor, head: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
        """The head is the page's scale.

        Raises:
            CodecError: if an element is infinite or not a number.
        """
        whole = nvfp4_whole(x)
        if not np.isfinite(whole):
            raise CodecError("nvfp4 cannot code infinities or NaN; use none for this page")
        head[:] = np.array([whole], "<f4").view(np.uint8)
        quantise_nvfp4_into(x, whole, self.four, scales[0], codes)

    def dequantise(
        self, head: np.ndarray, scales: np.ndarray, codes: np.ndarray, x: Tensor
    ) -> None:
        """Codes times both scales."""
        whole = float(np.frombuffer(head.tobytes(), "<f4")[0])
        dequantise_nvfp4_into(scales[0], codes, whole, x)
