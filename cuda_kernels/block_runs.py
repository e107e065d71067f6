"""Runs of whole blocks in CPU kernels: what block floats and block integers share.

Loops over a run know nothing of blocks, so that they become vector code; what a block has alone is spread over its
elements first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import pack_tiles, unpack_tiles
from .halves import narrow_result, widen
from .kernel_cache import njit
from .minifloats import round_to, widen_code

RUN = 2048  # elements done together, about: their float32 stay in the first cache


def whole_blocks(rows: np.ndarray, size: int) -> np.ndarray:
    """Give rows of whole blocks: themselves, or a copy with zeros behind. Shape: `[rows, width]`"""
    rest = -rows.shape[1] % size
    return np.pad(rows, ((0, 0), (0, rest))) if rest else rows


def keep(room: np.ndarray, rows: np.ndarray) -> None:
    """Write what `whole_blocks` copied where it belongs."""
    if room.shape != rows.shape:
        rows[:] = room[:, : rows.shape[1]]


def pack_blocks(
    quantise: Callable[[slice, np.ndarray, np.ndarray], object],
    source: np.ndarray, size: int, bits: int, codes: np.ndarray,
) -> None:  # fmt: skip
    """Call `quantise(which, numbers, codes)` for runs of rows made of whole blocks, and pack what it finds.

    Shape: source `[rows, width]` -> codes `[rows, packed_width]`; numbers, codes of a call `[whole blocks * size]`
    """

    def tile_of(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(source[a:b], size), whole_blocks(tile, size)
        quantise(slice(a, b), rows.reshape(-1), room.reshape(-1))
        keep(room, tile)

    pack_tiles(tile_of, source.shape, bits, codes)


def unpack_blocks(
    dequantise: Callable[[slice, np.ndarray, np.ndarray], object],
    codes: np.ndarray, size: int, bits: int, target: np.ndarray,
) -> None:  # fmt: skip
    """Undo it by `dequantise(which, codes, numbers)`."""

    def tile_of(a: int, b: int, tile: np.ndarray) -> None:
        rows, room = whole_blocks(tile, size), whole_blocks(target[a:b], size)
        dequantise(slice(a, b), rows.reshape(-1), room.reshape(-1))
        keep(room, target[a:b])

    unpack_tiles(tile_of, target.shape, bits, codes)


@njit(nogil=True)
def widen_all(run, wide):
    """Widen a run."""
    for i in range(run.size):
        wide[i] = widen(run[i])


@njit(nogil=True)
def worst_of_blocks(wide, size, worst):
    """Find the bits of each block's largest magnitude, NaN above all.

    A size that the compiler knows would be unrolled into single elements before it looks for vectors.
    """
    for b in range(worst.size):
        block, top = wide[b * size : (b + 1) * size], np.int32(0)
        for i in range(block.size):
            bits = np.int32(np.int32(np.float32(block[i]).view(np.int32)) & np.int32(0x7FFFFFFF))
            top = bits if bits > top else top
        worst[b] = top


@njit(nogil=True)
def spread(values, size, steps):
    """Write what a block has at each of its elements."""
    for b in range(values.size):
        block, value = steps[b * size : (b + 1) * size], values[b]
        for i in range(block.size):
            block[i] = value


@njit(nogil=True)
def round_run(wide, steps, form, codes):
    """Code numbers times what their blocks have; `form` is of `rounding_of`."""
    lowest, largest, lift, unit, sign = form
    for i in range(wide.size):
        codes[i] = round_to(wide[i] * steps[i], lowest, largest, lift, unit, sign)


@njit(nogil=True)
def widen_codes(codes, steps, form, x):
    """Undo it with the inverse factors; `form` is of `float16_of`."""
    lift, size_bits, sign_lift, top, bias = form
    for i in range(codes.size):
        x[i] = narrow_result(
            widen_code(codes[i], lift, size_bits, sign_lift, top) * bias * steps[i], x
        )


@njit(nogil=True)
def clear_blocks(worst, size, wide):
    """Make zeros of the blocks that hold a NaN."""
    for b in range(worst.size):
        if worst[b] > 0x7F800000:
            wide[b * size : (b + 1) * size] = 0


@njit(nogil=True)
def power(field):
    """2 ** (field - 127) for a field of 0 to 254; 0 is the subnormal 2 ** -127."""
    bits = np.int32(np.int32(field) << np.int32(23))
    bits = np.int32(bits if field > 0 else np.int32(0x00400000))
    return np.int32(bits).view(np.float32)
