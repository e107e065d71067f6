"""Rows in 8 bits with a scale for each row: the output of a norm that a quantised matrix product reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernel_cache import njit

INT8_MAX, E4M3_MAX = 127.0, 448.0
TOPS = {torch.int8: INT8_MAX, torch.float8_e4m3fn: E4M3_MAX}


class Quantised(NamedTuple):
    """Rows whose values are `values * scales`.

    Shape: values `[..., width]` (int8 or float8_e4m3fn), scales `[..., 1]` (float32): the row's largest magnitude
    over the largest number of the format, 1 for a row of zeros.
    """

    values: Tensor
    scales: Tensor

    def dequantised(self) -> Tensor:
        """Give the values back in float32."""
        return self.values.float() * self.scales


def quantise_rows(x: Tensor, dtype: torch.dtype) -> Quantised:
    """Quantise rows, symmetric, to nearest with ties to even.

    Raises:
        ValueError: the dtype is neither int8 nor float8_e4m3fn.
    """
    if dtype not in TOPS:
        raise ValueError(f"rows are quantised to {', '.join(map(str, TOPS))}, not to {dtype}")
    wide = x.float()
    top = wide.abs().amax(-1, keepdim=True)
    scales = torch.where(top > 0, top / TOPS[dtype], torch.ones_like(top))
    scaled = wide / scales
    return Quantised((scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales)


@njit(nogil=True)
def to_e4m3(x):
    """Round a float32 to the bits of a float8_e4m3fn, to nearest even; beyond 448 it saturates, a NaN stays."""
    bits = np.uint32(np.float32(x).view(np.uint32))
    sign = np.uint32((bits >> np.uint32(24)) & np.uint32(0x80))
    body = np.uint32(bits & np.uint32(0x7FFFFFFF))
    size = body.view(np.float32)
    if size != size:
        return np.uint8(sign | np.uint32(0x7F))
    if size < np.float32(0.015625):  # below 2**-6 numbers are 2**-9 apart
        return np.uint8(sign | np.uint32(np.rint(size * np.float32(512))))
    odd = np.uint32((body >> np.uint32(20)) & np.uint32(1))
    rounded = np.uint32(np.uint32(body + np.uint32(0x7FFFF) + odd) >> np.uint32(20))
    code = np.int64(rounded) - (120 << 3)  # the exponent's bias is 7, not 127
    return np.uint8(sign | np.uint32(min(code, 0x7E)))
