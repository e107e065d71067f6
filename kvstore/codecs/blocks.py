"""Bytes of pages in blocks along each vector: what MX, NVFP4, BFP and the microexponents share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.bits import packed_width
from .codec import InPlace, PageLayout, need_floats


@dataclass(frozen=True)
class Blocked(InPlace):
    """A head of some bytes, then a byte or more for each block, then packed codes.

    Blocks do not cross vectors: the last one of a head whose dim is no multiple is shorter.
    """

    lossless: ClassVar[bool] = False
    head_bytes: ClassVar[int] = 0  # for the page
    scale_bytes: ClassVar[int] = 1  # for a block

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Elements of a block."""

    @abstractmethod
    def quantise(self, x: Tensor, head: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
        """Fill the parts. Shape: x `[rows, width]`, scales `[scale_bytes, rows, blocks]`, codes `[rows, bytes]`"""

    @abstractmethod
    def dequantise(
        self, head: np.ndarray, scales: np.ndarray, codes: np.ndarray, x: Tensor
    ) -> None:
        """Fill x."""

    def _shape(self, layout: PageLayout) -> tuple[int, int, int]:
        """Rows, blocks of a row, bytes of a row's codes."""
        width = layout.shape[-1]
        return layout.vectors, -(-width // self.block), packed_width(width, self.code_bits)

    def max_bytes(self, layout: PageLayout) -> int:
        """No page takes fewer."""
        need_floats(layout, self.name)
        rows, blocks, width = self._shape(layout)
        return self.head_bytes + rows * (self.scale_bytes * blocks + width)

    def sections(self, layout: PageLayout) -> tuple[int, ...]:
        """The head, bytes of the blocks one plane after the other, codes."""
        rows, blocks, width = self._shape(layout)
        return self.head_bytes, *[rows * blocks] * self.scale_bytes, rows * width

    def _parts(
        self, data: np.ndarray, layout: PageLayout
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, blocks, width = self._shape(layout)
        ends = self.head_bytes + self.scale_bytes * rows * blocks
        scales = data[self.head_bytes : ends].reshape(self.scale_bytes, rows, blocks)
        return data[: self.head_bytes], scales, data[ends:].reshape(rows, width)

    def encode(self, page: Tensor) -> np.ndarray:
        """Quantise and pack.

        Raises:
            CodecError: if the format has no code for an element.
        """
        layout = PageLayout.of(page)
        data = np.empty(self.max_bytes(layout), np.uint8)
        x = page.float() if page.dtype == torch.float64 else page
        self.quantise(x.reshape(-1, page.shape[-1]), *self._parts(data, layout))
        return data

    def fill(self, data: np.ndarray, page: Tensor) -> None:
        """Codes times scales."""
        parts = self._parts(data, PageLayout.of(page))
        self.dequantise(*parts, page.view(-1, page.shape[-1]))
