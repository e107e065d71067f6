"""exponent: bfloat16 without loss, in about 11 bits: the exponents of real keys and values are few.

The idea of DFloat11 (https://arxiv.org/abs/2504.11651) with a standard entropy coder: sign and mantissa
stay as they are, the plane of exponents goes through zstd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .codec import CodecError, PageLayout, PageToBytes, bytes_tensor, need_length, tensor_bytes
from .zstd import compress, decompress


@dataclass(frozen=True)
class Exponent(PageToBytes):
    """Layout: 4 bytes, length of the packed exponents; they, or all of them unpacked; signs with mantissas."""

    name: ClassVar[str] = "exponent"
    lossless: ClassVar[bool] = True
    level: int = 1

    def max_bytes(self, layout: PageLayout) -> int:
        """As many as plain bytes, and four."""
        if layout.dtype != torch.bfloat16:
            raise CodecError(f"exponent is for bfloat16, not {layout.dtype}; use none+zstd")
        return 4 + layout.page_bytes

    def encode(self, page: Tensor) -> np.ndarray:
        """Cut every element in two bytes and pack one plane."""
        bits = tensor_bytes(page).view(np.uint16)
        exponents = (bits >> 7).astype(np.uint8)
        rest = ((bits & 0x7F) | (bits >> 8 & 0x80)).astype(np.uint8)
        packed = compress(exponents, self.level)
        if packed.size >= exponents.size:
            packed = exponents
        length = np.frombuffer(packed.size.to_bytes(4, "little"), np.uint8)
        return np.concatenate([length, packed, rest])

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Put the planes together."""
        if data.size < 4:
            raise CodecError("exponent: no length")
        length = int.from_bytes(data[:4].tobytes(), "little")
        need_length(data, 4 + length + layout.numel, self.name)
        packed, rest = data[4 : 4 + length], data[4 + length :].astype(np.uint16)
        exponents = packed if length == layout.numel else decompress(packed, layout.numel)
        need_length(exponents, layout.numel, self.name)
        bits = exponents.astype(np.uint16) << 7 | rest & 0x7F | (rest & 0x80) << 8
        return bytes_tensor(bits.view(np.uint8), torch.bfloat16).reshape(layout.shape)
