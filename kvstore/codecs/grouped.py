"""Bytes of codes with a scale and a low end for each group: what int4, int2 and KIVI share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.bits import packed_width
from ...cuda_kernels.int_groups import dequantise_into, quantise_into
from ...cuda_kernels.numbers import BITS_OF_HALF, half_of
from .codec import CodecError, InPlace, PageLayout, need_floats
from .places import CodePlaces


class Groups(NamedTuple):
    """How the groups of a page lie.

    Shape: of the page as kernels see it: `[rows, width]` with groups along the width, or with `channels`
        `[outer, tokens, inner]` with groups along the tokens.
    """

    shape: tuple[int, ...]
    bits: int
    size: int
    channels: bool

    @property
    def scales(self) -> tuple[int, ...]:
        """Shape of the scales."""
        along = -2 if self.channels else -1
        shape = [*self.shape]
        shape[along] = -(-shape[along] // self.size)
        return tuple(shape)


@dataclass(frozen=True)
class Grouped(InPlace):
    """16-bit scales, as many low ends, then packed codes. Real bits per element: `bits + 32 / group`.

    Scales are bfloat16 for bfloat16 pages, else float16, which values beyond 65504 do not fit: cast those pages
    first (`"bf16+int4"`).
    """

    lossless: ClassVar[bool] = False

    @abstractmethod
    def groups(self, layout: PageLayout) -> Groups:
        """Lay groups over a page.

        Raises:
            CodecError: if they do not fit.
        """

    def max_bytes(self, layout: PageLayout) -> int:
        """No page takes fewer."""
        need_floats(layout, self.name)
        cut = self.groups(layout)
        rows = layout.numel // cut.shape[-1]
        return 4 * math.prod(cut.scales) + rows * packed_width(cut.shape[-1], cut.bits)

    def sections(self, layout: PageLayout) -> tuple[int, ...]:
        """Scales, low ends, codes."""
        ends = 2 * int(np.prod(self.groups(layout).scales))
        return 0, ends, ends, self.max_bytes(layout) - 2 * ends

    def places(self, layout: PageLayout) -> CodePlaces | None:
        """Scales, low ends, codes, of two or four bits."""
        cut = self.groups(layout)
        codes = {2: "uint2", 4: "uint4"}.get(cut.bits)
        scales = "channels" if cut.channels else "pairs"
        return None if codes is None else CodePlaces(codes, scales, cut.size, (2, 0, 1))

    def _parts(
        self, data: np.ndarray, cut: Groups, dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut the bytes: codes, scales, low ends."""
        ends = 4 * math.prod(cut.scales)
        numbers = np.require(data[:ends], requirements="A")
        scales, lows = numbers.view(BITS_OF_HALF[half_of(dtype)]).reshape(2, *cut.scales)
        return data[ends:].reshape(-1, packed_width(cut.shape[-1], cut.bits)), scales, lows

    def encode(self, page: Tensor) -> np.ndarray:
        """Quantise and pack.

        Raises:
            CodecError: if an element is infinite, not a number, or a group too wide for its 16-bit scale.
        """
        layout = PageLayout.of(page)
        data, cut = np.empty(self.max_bytes(layout), np.uint8), self.groups(layout)
        x = (page.float() if page.dtype == torch.float64 else page).reshape(cut.shape)
        parts = self._parts(data, cut, x.dtype)
        if not quantise_into(x, cut.bits, cut.size, cut.channels, *parts):
            raise CodecError(
                f"{self.name} cannot code infinities or NaN, nor values beyond its 16-bit scales; "
                "use none for this page, or bf16 before it"
            )
        return data

    def fill(self, data: np.ndarray, page: Tensor) -> None:
        """Low ends plus codes times scales."""
        cut = self.groups(PageLayout.of(page))
        parts = self._parts(data, cut, page.dtype)
        dequantise_into(*parts, cut.bits, cut.size, cut.channels, page.view(cut.shape))


def check_group(name: str, bits: int, group: int) -> None:
    """Refuse options that no codec of groups has.

    Raises:
        ValueError: bits outside 1 to 8, or a group of nothing.
    """
    if not 1 <= bits <= 8 or group < 1:
        raise ValueError(
            f"{name}: bits={bits} must be 1 to 8 and group={group} at least 1, such as 32"
        )
