"""Vectors of codes, read where they lie and written as float32: what CPU kernels read pages of codes with.

A vector is `code * scale`, or `low + code * scale`, rounded as the codecs round it when they decode to float32. Written
as vectors of 16, in any order of tokens; a kernel keeps what it reads so in the first cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils

from .block_runs import power
from .halves import widen
from .kernel_cache import njit
from .vectors import floats, intrinsic, ints, load, moved, same, shuffled, spread, store, widened

LANES = 16
BITS = {"int8": 8, "e4m3": 8, "uint4": 4, "uint2": 2, "e2m1": 4}
KINDS = tuple(BITS)
INT8, E4M3, UINT4, UINT2, E2M1 = range(5)
SCALES = ("vector", "pairs", "powers", "e4m3", "channels")
VECTOR, PAIRS, POWERS, SMALL, CHANNELS = range(5)
BYTES, SHORTS, WORDS = (ints(bits, LANES) for bits in (8, 16, 32))
HALVES, FLOATS = (floats(bits, LANES) for bits in (16, 32))


class CodeForm(NamedTuple):
    """How the vectors of pages are held, in numbers, for kernels.

    Attributes:
        codes: of KINDS; scales: of SCALES, namely a float32 for a vector; a scale and a low end, 16-bit floats, for
            each `block` elements; a power of two for each 32; an e4m3 for each 16, times the float32 at the head; or a
            scale and a low end for each channel of `block` tokens.
        brain: whether 16-bit floats are bfloat16, else float16.
        code_bytes: of a vector; blocks: of a vector, each of `16 << shift` elements or all of it.
    """

    codes: int
    scales: int
    block: int
    brain: bool
    width: int
    page_tokens: int
    kv_heads: int
    code_bytes: int
    blocks: int
    shift: int

    @classmethod
    def of(
        cls, codes: str, scales: str, block: int, brain: bool, width: int, page_tokens: int,
        kv_heads: int,
    ) -> CodeForm | None:  # fmt: skip
        """Lay it out; None if kernels do not read it: vectors and blocks must be sixteens, blocks powers of two."""
        along = width if scales in ("vector", "channels") else block
        if width % LANES or along % LANES or width % along:
            return None
        shift = (along // LANES - 1).bit_length()
        if LANES << shift != along and along != width:
            return None
        return cls(
            KINDS.index(codes), SCALES.index(scales), block, brain, width, page_tokens, kv_heads,
            width * BITS[codes] // 8, width // along, shift,
        )  # fmt: skip


class CodeTable(NamedTuple):
    """Pages of codes where they lie.

    Shape: pages `[pages, 4]` int64: addresses of a page's codes, scales, low ends, and head.

    Attributes:
        held: what must live as long as the addresses are used.
    """

    form: CodeForm
    pages: np.ndarray
    held: Any = None


def _get(kind: Any) -> Any:
    @intrinsic
    def get(typingctx, address):
        """Load one number at an address."""

        def build(context, builder, signature, args):
            return load(builder, args[0], context.get_value_type(kind))

        return kind(address), build

    return get


@intrinsic
def put_float(typingctx, address, value):
    """Store a float32 at an address."""

    def build(context, builder, signature, args):
        store(builder, *args)
        return context.get_dummy_value()

    return types.void(address, types.float32), build


byte_at, half_at, float_at = (_get(kind) for kind in (types.uint8, types.uint16, types.float32))


def _few(builder: Any, codes: Any, bits: int) -> Any:
    """Sixteen codes of fewer than eight bits as words."""
    each = 8 // bits
    few = load(builder, codes, ints(8, LANES // each))
    held = builder.zext(shuffled(builder, [i // each for i in range(LANES)], few), WORDS)
    shifts = WORDS([bits * (i % each) for i in range(LANES)])
    return builder.and_(builder.lshr(held, shifts), same(WORDS, 2**bits - 1))


def _int8(builder: Any, codes: Any) -> Any:
    return builder.sitofp(builder.sext(load(builder, codes, BYTES), WORDS), FLOATS)


def _from_half(builder: Any, bits: Any, bias: float) -> Any:
    """Shorts as float16, whose exponents are moved up."""
    wide = builder.fpext(builder.bitcast(bits, HALVES), FLOATS)
    return builder.fmul(wide, same(FLOATS, bias))


def _e4m3(builder: Any, codes: Any) -> Any:
    held = builder.sext(load(builder, codes, BYTES), SHORTS)
    bits = builder.and_(builder.shl(held, same(SHORTS, 7)), same(SHORTS, -0x4001))
    return _from_half(builder, bits, 256.0)


def _e2m1(builder: Any, codes: Any) -> Any:
    code = _few(builder, codes, 4)
    size = builder.shl(builder.and_(code, same(WORDS, 7)), same(WORDS, 9))
    sign = builder.shl(builder.and_(code, same(WORDS, 8)), same(WORDS, 12))
    return _from_half(builder, builder.trunc(builder.or_(size, sign), SHORTS), 2.0**14)


def _uint(bits: int) -> Callable[[Any, Any], Any]:
    return lambda builder, codes: builder.sitofp(_few(builder, codes, bits), FLOATS)


def _writer(numbers: Callable[[Any, Any], Any], bits: int, lows: bool) -> Any:
    @intrinsic
    def write(typingctx, to, codes, width, shift, scales, low_ends):
        """Write a vector of float32; a scale and a low end, float32 at addresses, for each `16 << shift` of them."""

        def build(context, builder, signature, args):
            to, codes, width, shift, *ends = args
            with cgutils.for_range(builder, builder.sdiv(width, width.type(LANES))) as loop:
                at, block = loop.index, builder.lshr(loop.index, shift)
                places = [moved(builder, end, block, 4) for end in ends]
                scale, low = (
                    spread(builder, load(builder, place, FLOATS.element), FLOATS)
                    for place in (places if lows else places[:1] * 2)
                )
                value = numbers(builder, moved(builder, codes, at, LANES * bits // 8))
                value = builder.fmul(value, scale)
                value = builder.fadd(value, low) if lows else value
                store(builder, moved(builder, to, at, 4 * LANES), value)
            return context.get_dummy_value()

        return types.void(to, codes, width, shift, scales, low_ends), build

    return write


def _channel_writer(bits: int) -> Any:
    @intrinsic
    def write(typingctx, to, codes, width, scales, lows):
        """Write a vector of float32 with a scale and a low end for each element at addresses, float32."""

        def build(context, builder, signature, args):
            to, codes, width, *ends = args
            with cgutils.for_range(builder, builder.sdiv(width, width.type(LANES))) as loop:
                at = loop.index
                scale, low = (
                    load(builder, moved(builder, end, at, 4 * LANES), FLOATS) for end in ends
                )
                value = _uint(bits)(builder, moved(builder, codes, at, LANES * bits // 8))
                value = builder.fadd(builder.fmul(value, scale), low)
                store(builder, moved(builder, to, at, 4 * LANES), value)
            return context.get_dummy_value()

        return types.void(to, codes, width, scales, lows), build

    return write


_write_int8, _write_e4m3 = (_writer(of, 8, False) for of in (_int8, _e4m3))
_write_e2m1 = _writer(_e2m1, 4, False)
_write_uint4, _write_uint2 = (_writer(_uint(bits), bits, True) for bits in (4, 2))
_channels4, _channels2 = (_channel_writer(bits) for bits in (4, 2))


@intrinsic
def _widen_brains(typingctx, to, at):
    """Write 16 bfloat16 at an address as float32."""

    def build(context, builder, signature, args):
        store(builder, args[0], widened(builder, load(builder, args[1], SHORTS)))
        return context.get_dummy_value()

    return types.void(to, at), build


@intrinsic
def _widen_halves(typingctx, to, at):
    """Write 16 float16 at an address as float32."""

    def build(context, builder, signature, args):
        store(builder, args[0], builder.fpext(load(builder, args[1], HALVES), FLOATS))
        return context.get_dummy_value()

    return types.void(to, at), build


@njit(nogil=True)
def _write_vector(form, to, codes, scales, lows):
    """Write a vector; see `_writer`."""
    kind, width, shift = form.codes, form.width, form.shift
    if form.scales == CHANNELS and kind == UINT4:
        _channels4(to, codes, width, scales, lows)
    elif form.scales == CHANNELS:
        _channels2(to, codes, width, scales, lows)
    elif kind == INT8:
        _write_int8(to, codes, width, shift, scales, lows)
    elif kind == E4M3:
        _write_e4m3(to, codes, width, shift, scales, lows)
    elif kind == UINT4:
        _write_uint4(to, codes, width, shift, scales, lows)
    elif kind == UINT2:
        _write_uint2(to, codes, width, shift, scales, lows)
    else:
        _write_e2m1(to, codes, width, shift, scales, lows)


@njit(nogil=True)
def _half(address, brain):
    bits = half_at(address)
    return widen(bits) if brain else widen(np.int16(bits))


@njit(nogil=True)
def _small(code):
    """Give an e4m3's value, of its NaN, which no encoder here writes, as if it were a number."""
    bits = np.int16(np.int16(np.int16(np.int8(code)) * np.int16(128)) & np.int16(-0x4001))
    return np.float32(widen(bits) * np.float32(256))


@njit(nogil=True)
def _find_scales(form, scales, lows, head, first, to, apart):
    """Write the scales and low ends of a vector's blocks as float32, the latter `apart` bytes on."""
    if form.scales == PAIRS:
        for b in range(form.blocks):
            at = 2 * (first + b)
            put_float(to + 4 * b, _half(scales + at, form.brain))
            put_float(to + apart + 4 * b, _half(lows + at, form.brain))
    elif form.scales == POWERS:
        for b in range(form.blocks):
            field = byte_at(scales + first + b)
            value = np.float32(np.nan) if field == 255 else power(np.int32(field))
            put_float(to + 4 * b, value)
    else:
        whole = float_at(head)
        for b in range(form.blocks):
            put_float(to + 4 * b, _small(byte_at(scales + first + b)) * whole)


@njit(nogil=True)
def _widen_ends(form, scales, lows, row, to, apart):
    """Write the scales and low ends of the channels of some tokens as float32, the latter `apart` bytes on."""
    for i in range(0, form.width, LANES):
        at = 2 * (row * form.width + i)
        if form.brain:
            _widen_brains(to + 4 * i, scales + at)
            _widen_brains(to + apart + 4 * i, lows + at)
        else:
            _widen_halves(to + 4 * i, scales + at)
            _widen_halves(to + apart + 4 * i, lows + at)


@njit(nogil=True)
def room_for(form):
    """Make what `write_rows` remembers of each head: scales and low ends, and of which page and group they are."""
    return np.empty((form.kv_heads, 2, form.width), np.float32), np.full(
        form.kv_heads, -1, np.int64
    )


@njit(nogil=True)
def write_rows(to, form, table, page, inside, first, stop, head, ends, known):
    """Decode one head's vectors of tokens `[first, stop)` to addresses: token j is `inside[j]` of page `page[j]`."""
    apart, width = 4 * form.width, form.width
    room = np.int64(ends.ctypes.data) + 2 * head * apart
    for j in range(first, stop):
        p, vector = page[j], inside[j] * form.kv_heads + head
        codes, scales = table[p, 0] + vector * form.code_bytes, room
        if form.scales == VECTOR:
            scales = table[p, 1] + 4 * vector
        elif form.scales == CHANNELS:
            group = inside[j] // form.block
            if known[head] != p * form.page_tokens + group:
                known[head] = p * form.page_tokens + group
                row = group * form.kv_heads + head
                _widen_ends(form, table[p, 1], table[p, 2], row, room, apart)
        else:
            at = vector * form.blocks
            _find_scales(form, table[p, 1], table[p, 2], table[p, 3], at, room, apart)
        _write_vector(form, to, codes, scales, scales + apart)
        to += 4 * width
