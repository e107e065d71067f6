"""16-bit floats in kernels, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from plait.cuda_kernels import halves


@njit
def through(x: Any, out: Any, back: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = halves.widen(x[i])
        back[i] = halves.narrow(out[i], x)


@njit
def rounded(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = halves.narrow(x[i], out)


@njit
def rounded_results(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = halves.narrow_result(x[i] * np.float32(1), out)


@pytest.mark.parametrize(
    ("dtype", "look"), [(torch.float16, np.int16), (torch.bfloat16, np.uint16)]
)
def test_every_half_widens_and_comes_back(dtype: torch.dtype, look: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide, back = np.empty(1 << 16, np.float32), np.empty(1 << 16, look)
    through(bits.view(look), wide, back)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(wide, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], bits[numbers])
    assert (
        torch.from_numpy(back.view(np.int16)).view(dtype)[~torch.from_numpy(numbers)].isnan().all()
    )


@pytest.mark.parametrize(
    ("dtype", "look"), [(torch.float16, np.int16), (torch.bfloat16, np.uint16)]
)
def test_rounding_is_torchs(dtype: torch.dtype, look: Any) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    out = np.empty(len(x), look)
    rounded(x, out)
    found, expected = (
        torch.from_numpy(out.view(np.int16)).view(dtype),
        torch.from_numpy(x).to(dtype),
    )
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert torch.equal(found.isnan(), expected.isnan())
    x = np.where(np.isnan(x), np.float32(np.nan), x)  # what arithmetic gives for numbers
    again = np.empty(len(x), look)
    rounded_results(x, again)
    assert np.array_equal(again[~np.isnan(x)], out[~np.isnan(x)])
    assert torch.from_numpy(again.view(np.int16)).view(dtype).isnan().equal(expected.isnan())


def test_other_numbers_pass() -> None:
    x = np.array([1.5, -2.5])
    out, back = np.empty(2), np.empty(2)
    through(x, out, back)
    np.testing.assert_array_equal(back, x)
