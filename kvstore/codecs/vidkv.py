"""vidkv: keys of 1 to 2 bits. Channels of wide range get 2 bits, the others a sign for each Fourier coefficient.

In each group of tokens and head, the `bits - 1` of the channels with the widest range are coded as kivi codes them. The
others of a token are transformed together (real Fourier transform, orthonormal, as many numbers as channels), and each
coefficient is a sign times its mean magnitude over the group. Values are `ternary`.

The published code keeps twice the coefficients, drops the sign and codes its own history again; this one follows the
formulas, codes each group once, and says which channels were wide.

Source: VidKV (arXiv 2503.16257).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.bits import packed_width
from ...cuda_kernels.int_groups import dequantise_into, quantise_into
from ...cuda_kernels.numbers import bits_of, half_of
from ...cuda_kernels.sign_groups import dequantise_signs_into, quantise_signs_into, signs_bytes
from .codec import CodecError, PageLayout, PageToBytes, need_floats, need_length, readable
from .grouped import check_group
from .kivi import by_channels
from .ternary import Ternary


@lru_cache(maxsize=32)
def real_fourier(width: int) -> Tensor:
    """Make the orthonormal matrix of the real Fourier transform. Shape: `[width, width]` float32; `y = F x`"""
    t = torch.arange(width).double()
    rows = [torch.full((width,), math.sqrt(1 / width)).double()]
    for f in range(1, (width + 1) // 2):
        angle = 2 * math.pi * f * t / width
        rows += [torch.cos(angle) * math.sqrt(2 / width), torch.sin(angle) * math.sqrt(2 / width)]
    if width % 2 == 0:
        rows.append(torch.cos(math.pi * t) * math.sqrt(1 / width))
    return torch.stack(rows).float()


class Cuts(NamedTuple):
    """Sizes of one group of tokens of all heads."""

    heads: int
    width: int
    wide: int  # channels of a head with two bits

    @property
    def narrow(self) -> int:
        """Channels of a head with one bit."""
        return self.width - self.wide


@dataclass(frozen=True)
class VidKV(PageToBytes):
    """For each group of tokens: which channels are wide, their scales and low ends, the others' scales, both codes.

    Real bits per element: `bits + 32 / group * (bits - 1) + 16 / group * (2 - bits) + 1 / group`.
    """

    name: ClassVar[str] = "vidkv"
    lossless: ClassVar[bool] = False
    bits: float = 1.5
    group: int = 32

    def __post_init__(self) -> None:
        check_group(self.name, 1, self.group)
        if not 1 <= self.bits <= 2:
            raise ValueError(f"vidkv: bits={self.bits} must be 1 to 2")

    @property
    def tokens_at_once(self) -> int:
        """A group."""
        return self.group

    def for_values(self) -> PageToBytes:
        """Three levels a channel."""
        return Ternary(self.group)

    def _cuts(self, layout: PageLayout) -> Cuts:
        by_channels(layout, self.group, self.name)
        width = layout.shape[-1]
        return Cuts(layout.shape[-2], width, round(width * (self.bits - 1)))

    def _sizes(self, cut: Cuts) -> list[int]:
        """Bytes of the parts of a group."""
        wide, narrow = cut.heads * cut.wide, cut.heads * cut.narrow
        return [
            cut.heads * packed_width(cut.width, 1), 4 * wide, 2 * narrow,
            self.group * packed_width(wide, 2), signs_bytes(self.group * narrow, False),
        ]  # fmt: skip

    def max_bytes(self, layout: PageLayout) -> int:
        """No page takes fewer."""
        need_floats(layout, self.name)
        cut = self._cuts(layout)
        return layout.numel // (self.group * cut.heads * cut.width) * sum(self._sizes(cut))

    def sections(self, layout: PageLayout) -> tuple[int, ...]:
        """Group after group, so page after page."""
        return 0, self.max_bytes(layout)

    def encode(self, page: Tensor) -> np.ndarray:
        """Code group after group.

        Raises:
            CodecError: if an element is infinite, not a number, or a scale beyond its 16 bits.
        """
        layout = PageLayout.of(page)
        limit, cut = self.max_bytes(layout), self._cuts(layout)
        work = _work(page.dtype)
        groups = page.float().reshape(-1, self.group, cut.heads, cut.width)
        data = np.concatenate([self._encode_group(x, cut, work) for x in groups])
        need_length(data, limit, self.name)
        return data

    def _encode_group(self, x: Tensor, cut: Cuts, work: torch.dtype) -> np.ndarray:
        """Shape: `[group, heads, width]` float32 -> `[bytes]`"""
        reach = x.amax(0) - x.amin(0)
        order = reach.sort(dim=-1, descending=True, stable=True).indices
        wide, narrow = (part.sort(-1).values for part in order.split([cut.wide, cut.narrow], -1))
        marks = torch.zeros(cut.heads, cut.width, dtype=torch.uint8).scatter_(1, wide, 1)
        sizes = self._sizes(cut)
        parts = [np.packbits(marks.numpy(), axis=1, bitorder="little").reshape(-1)]
        parts += [np.empty(size, np.uint8) for size in sizes[1:]]
        kind = bits_of(torch.empty(0, dtype=half_of(work))).dtype
        rows = x.gather(2, wide.expand(self.group, -1, -1)).reshape(1, self.group, -1)
        fine = reach.isfinite().all()
        if cut.wide:
            scales, lows = parts[1].view(kind).reshape(2, 1, -1)
            packed = parts[3].reshape(self.group, -1)
            fine &= quantise_into(rows.to(work), 2, self.group, True, packed, scales, lows)
        if cut.narrow:
            rest = x.gather(2, narrow.expand(self.group, -1, -1)) @ real_fourier(cut.narrow).T
            signs = rest.reshape(1, self.group, -1)
            scales = parts[2].view(kind).reshape(1, -1)
            fine &= quantise_signs_into(signs, False, scales, parts[4])
        if not fine:
            raise CodecError(
                "vidkv cannot code infinities or NaN, nor values beyond its 16-bit scales; use none for this "
                "page, or bf16 before it"
            )
        return np.concatenate(parts)

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Decode group after group."""
        need_length(data, self.max_bytes(layout), self.name)
        cut, work = self._cuts(layout), _work(layout.dtype)
        runs = readable(data).reshape(-1, sum(self._sizes(cut)))
        groups = [self._decode_group(run, cut, work) for run in runs]
        return torch.stack(groups).to(layout.dtype).reshape(layout.shape)

    def _decode_group(self, data: np.ndarray, cut: Cuts, work: torch.dtype) -> Tensor:
        parts = [part.copy() for part in np.split(data, np.cumsum(self._sizes(cut))[:-1])]
        marks = np.unpackbits(
            parts[0].reshape(cut.heads, -1), axis=1, count=cut.width, bitorder="little"
        )
        if (marks.sum(1) != cut.wide).any():
            raise CodecError("vidkv: damaged: not as many wide channels as there must be")
        order = torch.from_numpy(np.argsort(1 - marks, axis=1, kind="stable"))
        wide, narrow = order.split([cut.wide, cut.narrow], 1)
        x = torch.empty(self.group, cut.heads, cut.width)
        kind = bits_of(torch.empty(0, dtype=half_of(work))).dtype
        if cut.wide:
            rows = torch.empty(1, self.group, cut.heads * cut.wide, dtype=work)
            scales, lows = parts[1].view(kind).reshape(2, 1, -1)
            dequantise_into(
                parts[3].reshape(self.group, -1), scales, lows, 2, self.group, True, rows
            )
            values = rows.float().reshape(self.group, cut.heads, cut.wide)
            x.scatter_(2, wide.expand(self.group, -1, -1), values)
        if cut.narrow:
            signs = torch.empty(1, self.group, cut.heads * cut.narrow)
            dequantise_signs_into(parts[2].view(kind).reshape(1, -1), parts[4], False, signs)
            values = signs.reshape(self.group, cut.heads, cut.narrow)
            x.scatter_(2, narrow.expand(self.group, -1, -1), values @ real_fourier(cut.narrow))
        return x


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype
