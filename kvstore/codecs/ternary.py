"""ternary: -s, 0 or s for each element, s for a channel and a group of tokens: 1.6 bits and a scale.

Source: the values of VidKV (arXiv 2503.16257), "1.58 bit".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.numbers import bits_of, half_of
from ...cuda_kernels.sign_groups import dequantise_signs_into, quantise_signs_into, signs_bytes
from .codec import CodecError, InPlace, PageLayout, need_floats
from .grouped import check_group
from .kivi import by_channels


@dataclass(frozen=True)
class Ternary(InPlace):
    """16-bit scales, then codes, five to a byte. Real bits per element: `1.6 + 16 / group`."""

    name: ClassVar[str] = "ternary"
    lossless: ClassVar[bool] = False
    group: int = 32

    def __post_init__(self) -> None:
        check_group(self.name, 1, self.group)

    @property
    def tokens_at_once(self) -> int:
        """A group."""
        return self.group

    def _cuts(self, layout: PageLayout) -> tuple[tuple[int, int, int], int]:
        """Shape for the kernel, and bytes of scales."""
        outer, tokens, inner = by_channels(layout, self.group, self.name)
        groups = outer * tokens // self.group
        return (groups, self.group, inner), 2 * groups * inner

    def max_bytes(self, layout: PageLayout) -> int:
        """No page takes fewer."""
        need_floats(layout, self.name)
        return self._cuts(layout)[1] + signs_bytes(layout.numel, True)

    def _parts(
        self, data: np.ndarray, layout: PageLayout, dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        shape, ends = self._cuts(layout)
        kind = bits_of(torch.empty(0, dtype=half_of(dtype))).dtype
        scales = np.require(data[:ends], requirements="A").view(kind)
        return scales.reshape(shape[0], shape[2]), data[ends:]

    def encode(self, page: Tensor) -> np.ndarray:
        """Scale, code, pack.

        Raises:
            CodecError: if an element is infinite, not a number, or a scale beyond its 16 bits.
        """
        layout = PageLayout.of(page)
        data = np.empty(self.max_bytes(layout), np.uint8)
        x = (page.float() if page.dtype == torch.float64 else page).reshape(self._cuts(layout)[0])
        if not quantise_signs_into(x, True, *self._parts(data, layout, x.dtype)):
            raise CodecError(
                "ternary cannot code infinities or NaN, nor values beyond its 16-bit scales; use none for "
                "this page, or bf16 before it"
            )
        return data

    def fill(self, data: np.ndarray, page: Tensor) -> None:
        """Signs times scales."""
        layout = PageLayout.of(page)
        scales, codes = self._parts(data, layout, page.dtype)
        dequantise_signs_into(scales, codes, True, page.view(self._cuts(layout)[0]))
