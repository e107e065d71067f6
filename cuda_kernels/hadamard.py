"""Random rotation of vectors by Hadamard matrices.

    y = H S x / sqrt(d),  S random signs: orthonormal, and the coordinates of y look normal whatever x was.

A width that is no power of two is rotated in its first and in its last `p` coordinates (the largest power of two that
fits) and in the first again, with signs before each: every coordinate meets every other, and it is still orthonormal.

Source: QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .hadamard_gpu import rotate_launch, serves
from .halves import narrow, widen
from .host import by_way_of_host
from .kernel_cache import njit
from .numbers import bits_of
from .workers import run_rows

LANES = 16  # vectors rotated together: every step is then whole vector registers
ELEMENTS_A_THREAD = 1 << 16


@lru_cache(maxsize=64)
def rotation_signs(width: int, seed: int) -> np.ndarray:
    """Draw the signs of up to three turns, the same everywhere and for ever. Shape: `[3, width]` float32, +-1"""
    drawn = hashlib.shake_128(f"plait signs {width} {seed}".encode()).digest(-(-3 * width // 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=3 * width)
    return (1 - 2 * bits.astype(np.float32)).reshape(3, width)


def rotation_reference(width: int, seed: int, inverse: bool = False) -> Tensor:
    """Make the matrix in float64. Shape: `[width, width]`; `y = R x`"""
    power = 1 << (width.bit_length() - 1)
    signs = torch.from_numpy(rotation_signs(width, seed)).double()
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    hadamard /= math.sqrt(power)
    whole = torch.eye(width, dtype=torch.float64)
    for number, at in enumerate((0,) if power == width else (0, width - power, 0)):
        step = torch.eye(width, dtype=torch.float64)
        step[at : at + power, at : at + power] = hadamard
        whole = step @ torch.diag(signs[number]) @ whole
    return whole.T if inverse else whole


@njit(nogil=True)
def _butterflies(tile, power):
    """Multiply by the Hadamard matrix of Sylvester, not normalised. Shape: tile `[power * LANES]`, lanes fastest."""
    half = 1
    while half < power:
        run = half * LANES
        for start in range(0, power * LANES, 2 * run):
            a, b = tile[start : start + run], tile[start + run : start + 2 * run]
            for i in range(run):
                x, y = a[i], b[i]
                a[i] = x + y
                b[i] = x - y
        half *= 2


@njit(nogil=True)
def _sign(tile, signs, at, power):
    """Multiply by the signs of a turn, the coordinates that turn by the norm of the matrix too."""
    factor = np.float32(1 / np.sqrt(power))
    for i in range(signs.size):
        row = tile[i * LANES : (i + 1) * LANES]
        inside = at <= i and i < at + power
        size = np.float32(signs[i] * (factor if inside else np.float32(1)))
        for j in range(LANES):
            row[j] *= size


@njit(nogil=True)
def turn(tile, signs, power, width):
    """Rotate a tile. Shape: tile `[width * LANES]`, lanes fastest."""
    for number in range(1 if power == width else 3):
        at = (width - power) if number == 1 else 0
        _sign(tile, signs[number], at, power)
        _butterflies(tile[at * LANES : (at + power) * LANES], power)


@njit(nogil=True)
def turn_back(tile, signs, power, width):
    """Undo `turn`."""
    steps = 1 if power == width else 3
    for back in range(steps):
        number = steps - 1 - back
        at = (width - power) if number == 1 else 0
        _butterflies(tile[at * LANES : (at + power) * LANES], power)
        _sign(tile, signs[number], at, power)


@njit(nogil=True)
def load_rows(x, first, tile):
    """Lay rows side by side; missing ones are zeros."""
    rows, width = min(LANES, x.shape[0] - first), x.shape[1]
    for j in range(rows):
        row = x[first + j]
        for i in range(width):
            tile[i * LANES + j] = widen(row[i])
    for j in range(rows, LANES):
        for i in range(width):
            tile[i * LANES + j] = 0
    return rows


@njit(nogil=True)
def store_rows(tile, first, rows, x):
    """Undo `load_rows`."""
    for j in range(rows):
        row = x[first + j]
        for i in range(x.shape[1]):
            row[i] = narrow(tile[i * LANES + j], x)


@njit(nogil=True)
def _rotate(x, signs, power, inverse, out):
    width = x.shape[1]
    tile = np.empty(width * LANES, np.float32)
    for first in range(0, x.shape[0], LANES):
        rows = load_rows(x, first, tile)
        if inverse:
            turn_back(tile, signs, power, width)
        else:
            turn(tile, signs, power, width)
        store_rows(tile, first, rows, out)


def plan_of(width: int, seed: int) -> tuple[np.ndarray, int]:
    """Give the signs, and the largest power of two that fits: what turns are made of."""
    return rotation_signs(width, seed), 1 << (width.bit_length() - 1)


def rotate_into(x: Tensor, seed: int, inverse: bool, out: Tensor) -> None:
    """Rotate contiguous rows in host memory, in float32. Shape: x, out `[rows, width]`"""
    signs, power = plan_of(x.shape[1], seed)
    source, target = bits_of(x), bits_of(out)
    run_rows(
        lambda a, b: _rotate(source[a:b], signs, power, inverse, target[a:b]),
        x.shape[0],
        ELEMENTS_A_THREAD // x.shape[1],
    )


@torch.library.custom_op("plait::rotate", mutates_args=())
def rotate(x: Tensor, seed: int, inverse: bool) -> Tensor:
    """Rotate vectors by the random Hadamard rotation of a seed, in float32; `inverse` undoes it.

    Shape: `[..., width]` -> likewise
    """
    rows = x.detach().cpu().reshape(-1, x.shape[-1]).contiguous()
    if rows.dtype == torch.float64:
        matrix = rotation_reference(x.shape[-1], seed, inverse)
        return (rows @ matrix.T).reshape(x.shape).to(x.device)
    out = torch.empty_like(rows)
    rotate_into(rows, seed, inverse, out)
    return out.reshape(x.shape).to(x.device)


@rotate.register_fake
def _(x: Tensor, seed: int, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def signs_on(width: int, seed: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rotation_signs(width, seed)[0].copy()).to(device)


@rotate.register_kernel("cuda")
def rotate_cuda(x: Tensor, seed: int, inverse: bool) -> Tensor:
    """Rotate in one launch; float64 and widths that are no power of two go by way of the host."""
    width, x = x.shape[-1], x.detach().contiguous()
    fits = serves(x.dtype, width) and x.data_ptr() % 16 == 0
    if not fits or not x.numel() or not usable():
        return by_way_of_host(rotate, [x], seed, inverse)
    out = torch.empty_like(x)
    run_on(rotate_launch(x, signs_on(width, seed, x.device), inverse, out), x)
    return out
