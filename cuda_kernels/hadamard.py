"""Random rotation of vectors by Hadamard matrices, and Lloyd-Max codes of what comes out.

    y = H S x / sqrt(d),  S random signs: orthonormal, and the coordinates of y look normal whatever x was.

A width that is no power of two is rotated in its first and in its last `p` coordinates (the largest power of two that
fits) and in the first again, with signs before each: every coordinate meets every other, and it is still orthonormal.

Source: QuaRot (arXiv 2404.00456); TurboQuant (arXiv 2504.19874) for the codes.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bits import pack_tiles, unpack_tiles
from .gpu.toolchain import usable
from .hadamard_gpu import rotate_launch, serves
from .halves import narrow, widen
from .numbers import bits_of
from .workers import run_rows

LANES = 16  # vectors rotated together: every step is then whole vector registers
ELEMENTS_A_THREAD = 1 << 16
SMALLEST = 2.0**-120  # a norm that float32 can divide by


@lru_cache(maxsize=64)
def rotation_signs(width: int, seed: int) -> np.ndarray:
    """Draw the signs of up to three turns, the same everywhere and for ever. Shape: `[3, width]` float32, +-1"""
    drawn = hashlib.shake_128(f"plait signs {width} {seed}".encode()).digest(-(-3 * width // 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=3 * width)
    return (1 - 2 * bits.astype(np.float32)).reshape(3, width)


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the levels that code a normal variable best, and the bounds between them.

    Shape: -> `[2 ** bits]`, `[2 ** bits - 1]` float32
    """
    count = 2**bits
    edges = np.array([math.inf])
    levels = torch.special.ndtri((torch.arange(count).double() + 0.5) / count)
    for _ in range(5000):
        bounds = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([torch.tensor([-math.inf]), bounds, torch.tensor([math.inf])]).double()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        better = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
        moved, levels = float((better - levels).abs().max()), better
        if moved < 1e-12:
            break
    bounds = (levels[1:] + levels[:-1]) / 2
    return levels.float().numpy(), bounds.float().numpy()


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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _sign(tile, signs, at, power):
    """Multiply by the signs of a turn, the coordinates that turn by the norm of the matrix too."""
    factor = np.float32(1 / np.sqrt(power))
    for i in range(signs.size):
        row = tile[i * LANES : (i + 1) * LANES]
        inside = at <= i and i < at + power
        size = np.float32(signs[i] * (factor if inside else np.float32(1)))
        for j in range(LANES):
            row[j] *= size


@njit(nogil=True, cache=True)
def _turn(tile, signs, power, width):
    """Rotate a tile. Shape: tile `[width * LANES]`, lanes fastest."""
    for number in range(1 if power == width else 3):
        at = (width - power) if number == 1 else 0
        _sign(tile, signs[number], at, power)
        _butterflies(tile[at * LANES : (at + power) * LANES], power)


@njit(nogil=True, cache=True)
def _turn_back(tile, signs, power, width):
    steps = 1 if power == width else 3
    for back in range(steps):
        number = steps - 1 - back
        at = (width - power) if number == 1 else 0
        _butterflies(tile[at * LANES : (at + power) * LANES], power)
        _sign(tile, signs[number], at, power)


@njit(nogil=True, cache=True)
def _load(x, first, tile):
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


@njit(nogil=True, cache=True)
def _store(tile, first, rows, x):
    for j in range(rows):
        row = x[first + j]
        for i in range(x.shape[1]):
            row[i] = narrow(tile[i * LANES + j], x)


@njit(nogil=True, cache=True)
def _rotate(x, signs, power, inverse, out):
    width = x.shape[1]
    tile = np.empty(width * LANES, np.float32)
    for first in range(0, x.shape[0], LANES):
        rows = _load(x, first, tile)
        if inverse:
            _turn_back(tile, signs, power, width)
        else:
            _turn(tile, signs, power, width)
        _store(tile, first, rows, out)


@njit(nogil=True, cache=True)
def _quantise_turbo(x, signs, power, bounds, norms, codes):
    """Shape: x, codes `[rows, width]`, norms `[rows]` 16-bit; give how many rows have no norm."""
    width, bad = x.shape[1], 0
    tile = np.empty(width * LANES, np.float32)
    squares, factors = np.empty(LANES, np.float64), np.empty(LANES, np.float32)
    found = np.empty(width * LANES, np.uint8)
    for first in range(0, x.shape[0], LANES):
        rows = _load(x, first, tile)
        squares[:] = 0
        for i in range(width):
            for j in range(LANES):
                value = np.float64(tile[i * LANES + j])
                squares[j] += value * value
        for j in range(LANES):
            norm = np.sqrt(squares[j])
            if norm < SMALLEST:  # nothing but subnormal numbers: zeros
                norm = 0.0
            if j < rows:
                norms[first + j] = narrow(np.float32(norm), norms)
                if not np.isfinite(widen(norms[first + j])):
                    bad += 1
            factors[j] = np.float32(np.sqrt(width) / norm) if norm > 0 else np.float32(0)
        for i in range(width):
            for j in range(LANES):
                tile[i * LANES + j] *= factors[j]
        _turn(tile, signs, power, width)
        found[:] = 0
        for bound in bounds:
            for i in range(width * LANES):
                found[i] += np.uint8(tile[i] > bound)
        for j in range(rows):
            row = codes[first + j]
            for i in range(width):
                row[i] = found[i * LANES + j]
    return bad


@njit(nogil=True, cache=True)
def _dequantise_turbo(codes, signs, power, levels, norms, x):
    rows_, width = codes.shape
    tile = np.empty(width * LANES, np.float32)
    factors = np.empty(LANES, np.float32)
    for first in range(0, rows_, LANES):
        rows = min(LANES, rows_ - first)
        tile[:] = 0
        factors[:] = 0
        for j in range(rows):
            row = codes[first + j]
            factors[j] = np.float32(widen(norms[first + j]) / np.float32(np.sqrt(width)))
            for i in range(width):
                tile[i * LANES + j] = levels[row[i]]
        _turn_back(tile, signs, power, width)
        for i in range(width):
            for j in range(LANES):
                tile[i * LANES + j] *= factors[j]
        _store(tile, first, rows, x)


def _plan(width: int, seed: int) -> tuple[np.ndarray, int]:
    return rotation_signs(width, seed), 1 << (width.bit_length() - 1)


def rotate_into(x: Tensor, seed: int, inverse: bool, out: Tensor) -> None:
    """Rotate contiguous rows in host memory, in float32. Shape: x, out `[rows, width]`"""
    signs, power = _plan(x.shape[1], seed)
    source, target = bits_of(x), bits_of(out)
    run_rows(
        lambda a, b: _rotate(source[a:b], signs, power, inverse, target[a:b]),
        x.shape[0],
        ELEMENTS_A_THREAD // x.shape[1],
    )


def quantise_turbo_into(
    x: Tensor, bits: int, seed: int, norms: np.ndarray, codes: np.ndarray
) -> bool:
    """Rotate rows, divide by their norm, code each coordinate; say whether every row has a 16-bit norm.

    Shape: x `[rows, width]` -> norms `[rows]` as `bits_of` sees 16-bit floats, codes `[rows, packed_width]` uint8
    """
    (signs, power), source = _plan(x.shape[1], seed), bits_of(x)
    bounds, bad = lloyd_max(bits)[1], []

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        bad.append(_quantise_turbo(source[a:b], signs, power, bounds, norms[a:b], tile))

    pack_tiles(quantise, source.shape, bits, codes)
    return not any(bad)


def dequantise_turbo_into(
    norms: np.ndarray, codes: np.ndarray, bits: int, seed: int, x: Tensor
) -> None:
    """Undo `quantise_turbo_into`."""
    (signs, power), target = _plan(x.shape[1], seed), bits_of(x)
    levels = lloyd_max(bits)[0]

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        _dequantise_turbo(tile, signs, power, levels, norms[a:b], target[a:b])

    unpack_tiles(dequantise, target.shape, bits, codes)


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
def _signs_on(width: int, seed: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rotation_signs(width, seed)[0].copy()).to(device)


@rotate.register_kernel("cuda")
def rotate_cuda(x: Tensor, seed: int, inverse: bool) -> Tensor:
    """Rotate in one launch; float64 and widths that are no power of two go by way of the host."""
    width, x = x.shape[-1], x.detach().contiguous()
    fits = serves(x.dtype, width) and x.data_ptr() % 16 == 0
    if not fits or not x.numel() or not usable():
        return rotate(x.cpu(), seed, inverse).to(x.device)
    out = torch.empty_like(x)
    variant, grid, args = rotate_launch(x, _signs_on(width, seed, x.device), inverse, out)
    variant.launch(grid, *args)
    return out


# inlines halves.py 3d74d947
