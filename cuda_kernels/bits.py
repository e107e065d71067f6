"""Codes of a few bits, one after the other: element i of a row begins at bit `i * bits`, low bits first.

This is the order of torchao, ml_dtypes' neighbours and GPU tensor cores for four bits (low nibble = even element).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .kernel_cache import njit
from .workers import run_rows

TILE = 1 << 18  # codes: they fit the second cache, and calls are few
WORDS = {1: np.uint64, 2: np.uint32, 4: np.uint16}  # as many codes as make one byte


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of so many codes."""
    return (width * bits + 7) // 8


def pack_codes_reference(codes: Tensor, bits: int) -> Tensor:
    """Pack in plain torch, bit by bit.

    Shape: codes `[rows, width]` uint8, below `2 ** bits` -> `[rows, packed_width]` uint8
    """
    rows, width = codes.shape
    planes = codes[:, :, None] >> torch.arange(bits, dtype=torch.uint8) & 1
    flat = torch.nn.functional.pad(planes.flatten(1), (0, -width * bits % 8))
    powers = 1 << torch.arange(8)
    return (flat.unflatten(1, (-1, 8)).long() * powers).sum(-1).to(torch.uint8).reshape(rows, -1)


@njit(nogil=True)
def _pack_words(words, out):
    """Whole bytes: a word holds the codes of one, a byte each."""
    for i in range(words.size):
        w = words[i]
        if words.itemsize == 2:
            out[i] = np.uint8(w | w >> 4)
        elif words.itemsize == 4:
            out[i] = np.uint8(w | w >> 6 | w >> 12 | w >> 18)
        else:
            w |= w >> np.uint64(7)
            w |= w >> np.uint64(14)
            out[i] = np.uint8((w | w >> np.uint64(28)) & np.uint64(255))


@njit(nogil=True)
def _unpack_words(data, words):
    for i in range(words.size):
        if words.itemsize == 2:
            w = np.uint32(data[i])
            words[i] = np.uint16((w | w << 4) & 0x0F0F)
        elif words.itemsize == 4:
            w = np.uint32(data[i])
            words[i] = np.uint32((w | w << 6 | w << 12 | w << 18) & 0x03030303)
        else:
            w = np.uint64(data[i])
            w |= w << np.uint64(28)
            w |= w << np.uint64(14)
            words[i] = (w | w << np.uint64(7)) & np.uint64(0x0101010101010101)


@njit(nogil=True)
def _pack_eights(words, bits, out):
    """Eight codes, a byte each, to as many bytes as they have bits: pairs come together, then fours, then all."""
    a, b, c = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    low, even, first = (
        np.uint64(0x00FF00FF00FF00FF),
        np.uint64(0x0000FFFF0000FFFF),
        np.uint64(0xFFFFFFFF),
    )
    for i in range(words.size):
        w, place = words[i], out[i * bits : (i + 1) * bits]
        w = (w & low) | ((w & ~low) >> a)
        w = (w & even) | ((w & ~even) >> b)
        w = (w & first) | ((w & ~first) >> c)
        for j in range(place.size):
            place[j] = np.uint8(w & np.uint64(255))
            w >>= np.uint64(8)


@njit(nogil=True)
def _unpack_eights(data, bits, words):
    a, b, c = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    first = np.uint64((1 << 4 * bits) - 1)
    even = np.uint64(0x0000000100000001) * np.uint64((1 << 2 * bits) - 1)
    low = np.uint64(0x0001000100010001) * np.uint64((1 << bits) - 1)
    for i in range(words.size):
        place, w = data[i * bits : (i + 1) * bits], np.uint64(0)
        for j in range(place.size - 1, -1, -1):
            w = (w << np.uint64(8)) | np.uint64(place[j])
        w = (w & first) | ((w & ~first) << c)
        w = (w & even) | ((w & ~even) << b)
        words[i] = (w & low) | ((w & ~low) << a)


@njit(nogil=True)
def _pack_any(codes, bits, out):
    """Any width and number of bits."""
    rows, width = codes.shape
    for r in range(rows):
        held, count, at = np.uint64(0), np.uint64(0), 0
        for i in range(width):
            held |= np.uint64(codes[r, i]) << count
            count += np.uint64(bits)
            while count >= np.uint64(8):
                out[r, at] = np.uint8(held & np.uint64(255))
                held >>= np.uint64(8)
                count -= np.uint64(8)
                at += 1
        if count > np.uint64(0):
            out[r, at] = np.uint8(held & np.uint64(255))


@njit(nogil=True)
def _unpack_any(data, bits, codes):
    rows, width = codes.shape
    mask = np.uint64((1 << bits) - 1)
    for r in range(rows):
        held, count, at = np.uint64(0), np.uint64(0), 0
        for i in range(width):
            while count < np.uint64(bits):
                held |= np.uint64(data[r, at]) << count
                count += np.uint64(8)
                at += 1
            codes[r, i] = np.uint8(held & mask)
            held >>= np.uint64(bits)
            count -= np.uint64(bits)


def pack_codes_plain(codes: Tensor, bits: int) -> Tensor:
    """Pack in Numba on the CPU."""
    rows, width = codes.shape
    if codes.device.type != "cpu":
        return pack_codes_reference(codes, bits)
    if bits == 8:
        return codes.clone()
    out = torch.empty(rows, packed_width(width, bits), dtype=torch.uint8)
    pack_into(codes.contiguous().numpy(), bits, out.numpy())
    return out


def pack_into(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Pack contiguous rows into contiguous rows of bytes."""
    if bits == 8:
        np.copyto(out, codes)
    elif bits in WORDS and codes.shape[1] * bits % 8 == 0:
        _pack_words(codes.reshape(-1).view(WORDS[bits]), out.reshape(-1))
    elif codes.shape[1] % 8 == 0:
        _pack_eights(codes.reshape(-1).view(np.uint64), bits, out.reshape(-1))
    else:
        _pack_any(codes, bits, out)


def unpack_into(data: np.ndarray, bits: int, codes: np.ndarray) -> None:
    """Undo `pack_into`."""
    if bits == 8:
        np.copyto(codes, data)
    elif bits in WORDS and codes.shape[1] * bits % 8 == 0:
        _unpack_words(data.reshape(-1), codes.reshape(-1).view(WORDS[bits]))
    elif codes.shape[1] % 8 == 0:
        _unpack_eights(data.reshape(-1), bits, codes.reshape(-1).view(np.uint64))
    else:
        _unpack_any(data, bits, codes)


def pack_tiles(
    quantise: Callable[[int, int, np.ndarray], object],
    shape: tuple[int, ...], bits: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Quantise and pack tile by tile, so that codes stay in the cache; in threads where there is much.

    Args:
        quantise: called with `start, stop, tile`, fills codes of units start to stop.

    Shape: `[units, ..., width]` of codes -> out `[rows, packed_width]`; tile `[stop - start, ..., width]`
    """

    def fill(start: int, stop: int, packed: np.ndarray, tile: np.ndarray) -> None:
        quantise(start, stop, tile)
        if bits != 8:
            pack_into(tile.reshape(-1, shape[-1]), bits, packed)

    _each_tile(fill, shape, bits, out)


def unpack_tiles(
    dequantise: Callable[[int, int, np.ndarray], object],
    shape: tuple[int, ...], bits: int, data: np.ndarray,
) -> None:  # fmt: skip
    """Unpack and dequantise tile by tile; the inverse of `pack_tiles`."""

    def read(start: int, stop: int, packed: np.ndarray, tile: np.ndarray) -> None:
        if bits != 8:
            unpack_into(packed, bits, tile.reshape(-1, shape[-1]))
        dequantise(start, stop, tile)

    _each_tile(read, shape, bits, data)


def _each_tile(
    visit: Callable[[int, int, np.ndarray, np.ndarray], None],
    shape: tuple[int, ...], bits: int, data: np.ndarray,
) -> None:  # fmt: skip
    """Call `visit(start, stop, packed, tile)` for runs of units whose codes fit the cache."""
    rows, step = math.prod(shape[1:-1]), max(1, TILE // math.prod(shape[1:]))

    def part(a: int, b: int) -> None:
        room = np.empty((min(step, b - a) if bits != 8 else 0, *shape[1:]), np.uint8)
        for start in range(a, b, step):
            stop = min(start + step, b)
            packed = data[start * rows : stop * rows]
            tile = packed.reshape(-1, *shape[1:]) if bits == 8 else room[: stop - start]
            visit(start, stop, packed, tile)

    run_rows(part, shape[0], step)
