"""Pieces of memory that a thread moves at once: 16 bytes, or what a tensor's addresses and steps allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import ptx
from .ptx import device_function, u32

SIZES = (16, 8, 4, 2, 1)


def piece_bytes(numbers: Iterable[int]) -> int:
    """The largest piece of which all these addresses, steps and lengths are multiples."""
    shared = 16
    for number in numbers:
        shared |= int(number)
    return shared & -shared


@device_function
def _load16(at):
    return ptx.ld16_once(at)


@device_function
def _store16(at, a, b, c, d):
    ptx.st16(at, a, b, c, d)


@device_function
def _load8(at):
    a, b = ptx.ld8(at)
    return a, b, u32(0), u32(0)


@device_function
def _store8(at, a, b, c, d):
    ptx.st8(at, a, b)


def movers(size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Give what loads a piece that nobody writes during the kernel, as four words, and what stores them."""
    if size == 16:
        return _load16, _store16
    if size == 8:
        return _load8, _store8
    get, put = {4: (ptx.ld4, ptx.st4), 2: (ptx.ld2, ptx.st2), 1: (ptx.ld1, ptx.st1)}[size]

    @device_function
    def load(at):
        return get(at), u32(0), u32(0), u32(0)

    @device_function
    def store(at, a, b, c, d):
        put(at, a)

    return load, store
