"""Lloyd-Max codes of randomly rotated vectors: each coordinate of a rotated vector looks normal, and is coded as such.

    norm = |x|;  y = R x * sqrt(width) / norm;  code = bounds below y;  x ~ R^-1 levels[code] * norm / sqrt(width)

Norms are found after a division by a power of two, in float32 and adding neighbours first: nothing overflows, the error
is a few units whatever the width, and a GPU can do the same.

Source: TurboQuant (arXiv 2504.19874), with the rotation of `hadamard.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .bits import pack_tiles, packed_width, unpack_tiles
from .block_runs import power
from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .hadamard import LANES, load_rows, plan_of, rotation_signs, store_rows, turn, turn_back
from .halves import narrow, widen
from .host import by_way_of_host, coded_on_host, decoded_on_host
from .kernel_cache import njit
from .numbers import bits_of, half_of
from .turbo_gpu import SMALLEST, dequantise_launch, quantise_launch, serves

CANNOT = "quantise_turbo: infinities, NaN, or norms beyond 16 bits"


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


@njit(nogil=True)
def _lift(tile, width, lifts, backs):
    """Divide vectors by powers of two so that their largest element is 1 to 2. Shape: tile `[width * LANES]`"""
    worst = np.zeros(LANES, np.int32)
    for i in range(width):
        row = tile[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            size = np.int32(np.int32(np.float32(row[j]).view(np.int32)) & np.int32(0x7FFFFFFF))
            worst[j] = size if size > worst[j] else worst[j]
    for j in range(LANES):
        field = np.int32(min(max(np.int32(worst[j] >> np.int32(23)), np.int32(1)), np.int32(254)))
        lifts[j], backs[j] = power(np.int32(254) - field), power(field)
    _scale(tile, width, lifts)


@njit(nogil=True)
def _scale(tile, width, factors):
    for i in range(width):
        row = tile[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            row[j] *= factors[j]


@njit(nogil=True)
def _add_squares(tile, width, parts):
    """Leave the sums of squares in the first row of `parts`: neighbours are added, then neighbours of those."""
    for i in range(width * LANES):
        parts[i] = tile[i] * tile[i]
    count = width
    while count > 1:
        half = count // 2
        for i in range(half):
            to = parts[i * LANES : (i + 1) * LANES]
            a = parts[2 * i * LANES : (2 * i + 1) * LANES]
            b = parts[(2 * i + 1) * LANES : (2 * i + 2) * LANES]
            for j in range(LANES):
                to[j] = a[j] + b[j]
        if count % 2:
            parts[half * LANES : (half + 1) * LANES] = parts[(count - 1) * LANES : count * LANES]
        count = half + count % 2


@njit(nogil=True)
def _norms_of(parts, backs, width, rows, norms, factors):
    """Write 16-bit norms; give what makes the vectors' length sqrt(width), and how many have no norm."""
    bad, whole = 0, np.float32(np.sqrt(width))
    for j in range(rows):
        root = np.float32(np.sqrt(np.float32(parts[j])))
        norm = np.float32(root * backs[j])
        if norm < np.float32(SMALLEST):  # nothing but subnormal numbers: zeros
            norm = np.float32(0)
        norms[j] = narrow(norm, norms)
        bad += not np.isfinite(widen(norms[j]))
        factors[j] = np.float32(whole / root) if norm > 0 else np.float32(0)
    return bad


@njit(nogil=True)
def _quantise_turbo(x, signs, power_of_two, bounds, norms, codes):
    """Shape: x, codes `[rows, width]`, norms `[rows]` 16-bit; give how many rows have no norm."""
    width, bad = x.shape[1], 0
    tile, parts = np.empty(width * LANES, np.float32), np.empty(width * LANES, np.float32)
    factors, backs = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    found = np.empty(width * LANES, np.uint8)
    for first in range(0, x.shape[0], LANES):
        rows = load_rows(x, first, tile)
        _lift(tile, width, factors, backs)
        _add_squares(tile, width, parts)
        factors[:] = 0
        bad += _norms_of(parts, backs, width, rows, norms[first : first + rows], factors)
        _scale(tile, width, factors)
        turn(tile, signs, power_of_two, width)
        found[:] = 0
        for bound in bounds:
            for i in range(width * LANES):
                found[i] += np.uint8(tile[i] > bound)
        for j in range(rows):
            row = codes[first + j]
            for i in range(width):
                row[i] = found[i * LANES + j]
    return bad


@njit(nogil=True)
def _dequantise_turbo(codes, signs, power_of_two, levels, norms, x):
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
        turn_back(tile, signs, power_of_two, width)
        _scale(tile, width, factors)
        store_rows(tile, first, rows, x)


def quantise_turbo_into(
    x: Tensor, bits: int, seed: int, norms: np.ndarray, codes: np.ndarray
) -> bool:
    """Rotate rows, divide by their norm, code each coordinate; say whether every row has a 16-bit norm.

    Shape: x `[rows, width]` -> norms `[rows]` as `bits_of` sees 16-bit floats, codes `[rows, packed_width]` uint8
    """
    (signs, largest), source = plan_of(x.shape[1], seed), bits_of(x)
    bounds, bad = lloyd_max(bits)[1], []

    def quantise(a: int, b: int, tile: np.ndarray) -> None:
        bad.append(_quantise_turbo(source[a:b], signs, largest, bounds, norms[a:b], tile))

    pack_tiles(quantise, source.shape, bits, codes)
    return not any(bad)


def dequantise_turbo_into(
    norms: np.ndarray, codes: np.ndarray, bits: int, seed: int, x: Tensor
) -> None:
    """Undo `quantise_turbo_into`."""
    (signs, largest), target = plan_of(x.shape[1], seed), bits_of(x)
    levels = lloyd_max(bits)[0]

    def dequantise(a: int, b: int, tile: np.ndarray) -> None:
        _dequantise_turbo(tile, signs, largest, levels, norms[a:b], target[a:b])

    unpack_tiles(dequantise, target.shape, bits, codes)


@torch.library.custom_op("plait::quantise_turbo", mutates_args=())
def quantise_turbo(x: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rotate rows by the rotation of a seed and code each coordinate in 1 to 4 bits.

    Shape: x `[rows, width]` -> norms `[rows]` (16-bit floats), codes `[rows, packed_width]` uint8

    Raises:
        ValueError: an element is infinite or NaN, or a norm beyond its 16 bits.
    """
    parts, fine = coded_on_host(
        lambda x, *parts: quantise_turbo_into(x, bits, seed, *parts), x, _rooms(x, bits, seed)
    )
    if not fine:
        raise ValueError(CANNOT)
    return parts[0], parts[1]


def _rooms(x: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    norms = x.new_empty(rows, dtype=half_of(x.dtype))
    return norms, x.new_empty(rows, packed_width(width, bits), dtype=torch.uint8)


quantise_turbo.register_fake(_rooms)


@torch.library.custom_op("plait::dequantise_turbo", mutates_args=())
def dequantise_turbo(
    norms: Tensor, codes: Tensor, bits: int, seed: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo `quantise_turbo`. Shape: -> `[rows, width]` of the dtype"""
    return decoded_on_host(
        lambda n, c, x: dequantise_turbo_into(n, c, bits, seed, x),
        (norms, codes), (codes.shape[0], width), dtype,
    )  # fmt: skip


@dequantise_turbo.register_fake
def _(norms: Tensor, codes: Tensor, bits: int, seed: int, width: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], width, dtype=dtype)


@lru_cache(maxsize=64)
def table_on(width: int, seed: int, numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Give a kernel's table on a device: signs, then levels or bounds. Shape: `[width + numbers]` float32"""
    signs = rotation_signs(width, seed)[0]
    return torch.from_numpy(np.append(signs, np.asarray(numbers, np.float32))).to(device)


def _fits(x: Tensor, codes: Tensor, bits: int) -> bool:
    """Say whether the CUDA kernels take such rows, and can run."""
    aligned = x.data_ptr() % 16 == 0 and codes.data_ptr() % 4 == 0
    return bool(x.numel()) and aligned and serves(x.dtype, x.shape[-1], bits) and usable()


@quantise_turbo.register_kernel("cuda")
def quantise_turbo_cuda(x: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Quantise in one launch; what the kernel does not serve goes by way of the host."""
    x = x.contiguous()
    norms, codes = _rooms(x, bits, seed)
    if not _fits(x, codes, bits):
        return by_way_of_host(quantise_turbo, [x], bits, seed)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    table = table_on(x.shape[1], seed, tuple(lloyd_max(bits)[1].tolist()), x.device)
    run_on(quantise_launch(x, table, bits, norms, codes, flag), x)
    if bool(flag):
        raise ValueError(CANNOT)
    return norms, codes


@dequantise_turbo.register_kernel("cuda")
def dequantise_turbo_cuda(
    norms: Tensor, codes: Tensor, bits: int, seed: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Undo it in one launch."""
    n, c = norms.contiguous(), codes.contiguous()
    x = c.new_empty(c.shape[0], width, dtype=dtype)
    if not _fits(x, c, bits) or norms.dtype != half_of(dtype):
        return by_way_of_host(dequantise_turbo, [n, c], bits, seed, width, dtype)
    table = table_on(width, seed, tuple(lloyd_max(bits)[0].tolist()), c.device)
    run_on(dequantise_launch(n, c, table, bits, x), c)
    return x
