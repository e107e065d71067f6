"""How a decode kernel reads pages: bfloat16, or codes of 8 and 4 bits that become bfloat16 in registers.

A reader fetches pieces of 8 neighbouring dims of one token's vector. Codes become bfloat16 exactly; a scale of a whole
vector is left to the kernel (it multiplies scores and weights, in float32), scales of blocks are applied here.

    e4m3, int8      a float32 scale for each vector                           codecs fp8, int8
    int4            bfloat16 scale and low end for each `block` channels      codec int4
    mxfp8, mxfp4    a power of two for each 32 channels                       codecs mxfp8 (e4m3), mxfp4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import ptx
from .ptx import device_function, u32, u64

ONE, TO_120, TO_126 = u32(0x3F803F80), u32(0x7B807B80), u32(0x7E807E80)  # pairs of bfloat16
MINUS_ZERO = u32(0x80008000)
LOWS, HIGHS = u32(0x5410), u32(0x7632)
FORMS = {"bf16": 16, "e4m3": 8, "int8": 8, "int4": 4, "mxfp8": 8, "mxfp4": 4}  # bits


class PageForm(NamedTuple):
    """How the vectors of K or V are held.

    Attributes:
        name: of FORMS.
        block: channels that share a scale; 0: the whole vector.
        page_bytes: from one page to the next of codes, scales and low ends alike, where pages are coded one by one;
            0: codes of all pages lie together, and so do scales and low ends.
    """

    name: str = "bf16"
    block: int = 0
    page_bytes: int = 0

    def __str__(self) -> str:
        return (
            self.name + (f":{self.block}" if self.block else "") + ("*" if self.page_bytes else "")
        )


class Reader(NamedTuple):
    """Device functions for one form and width.

    Attributes:
        pieces: of 8 dims that one load brings.
        load: `load(address) -> words` of codes.
        scales: `scales(at, lows_at, block) -> scale, low` as pairs of bfloat16.
        widen: `widen(words, at, piece, scale, low, out, place)` makes 4 words, pairs of neighbours, of a load at `at`.
    """

    pieces: int
    load: Callable[..., Any]
    scales: Callable[..., Any]
    widen: Callable[..., Any]


@device_function
def _load16(at):
    return ptx.ld16_once(at)


@device_function
def _load8(at):
    a, b = ptx.ld8(at)
    return a, b, u32(0), u32(0)


@device_function
def _load4(at):
    return ptx.ld4(at), u32(0), u32(0), u32(0)


@device_function
def _no_scales(at, lows_at, block):
    return ONE, MINUS_ZERO


@device_function
def _pairs(at, lows_at, block):
    scale, low = ptx.ld2(at + block * u64(2)), ptx.ld2(lows_at + block * u64(2))
    return u32(scale | (scale << u32(16))), u32(low | (low << u32(16)))


@device_function
def _powers(at, lows_at, block):
    field = ptx.ld1(at + block)
    half = u32(field << u32(7))  # a bfloat16 is its exponent
    half = u32(0x0040) if field == u32(0) else half
    half = u32(0x7FC0) if field == u32(255) else half
    return u32(half | (half << u32(16))), MINUS_ZERO


@device_function
def _copy(words, at, piece, scale, low, out, place):
    for i in range(4):
        out[place + i] = words[at + i]


@device_function
def _of_e4m3(pair):
    """Two bytes in the upper bytes of their halves: the exponent's bias is 7, not 127."""
    bits = u32((pair & MINUS_ZERO) | u32((pair & u32(0x7F007F00)) >> u32(4)))
    return ptx.multiply_add_bf16x2(bits, TO_120, MINUS_ZERO)


@device_function
def _e4m3(words, at, piece, scale, low, out, place):
    for i in range(4):
        held = words[at + 2 * piece + i // 2]
        out[place + i] = _of_e4m3(
            ptx.pick_bytes(held, u32(0), u32(0x3424) if i % 2 else u32(0x1404))
        )


@device_function
def _mxfp8(words, at, piece, scale, low, out, place):
    _e4m3(words, at, piece, scale, low, out, place)
    for i in range(4):
        out[place + i] = ptx.multiply_add_bf16x2(out[place + i], scale, MINUS_ZERO)


@device_function
def _int8(words, at, piece, scale, low, out, place):
    """128 plus the lower 7 bits, less 128 or, for a negative number, 256: all exact."""
    for i in range(4):
        held = words[at + 2 * piece + i // 2]
        pair = ptx.pick_bytes(held, u32(0), u32(0x4342) if i % 2 else u32(0x4140))
        above = u32((pair & u32(0x007F007F)) | u32(0x43004300))
        below = u32((pair & u32(0x00800080)) | u32(0xC300C300))
        out[place + i] = ptx.multiply_add_bf16x2(above, ONE, below)


@device_function
def _neighbours(out, place, first, second, third, fourth):
    """Elements (0, 4), (1, 5), (2, 6), (3, 7) as (0, 1), (2, 3), (4, 5), (6, 7)."""
    out[place] = ptx.pick_bytes(first, second, LOWS)
    out[place + 1] = ptx.pick_bytes(third, fourth, LOWS)
    out[place + 2] = ptx.pick_bytes(first, second, HIGHS)
    out[place + 3] = ptx.pick_bytes(third, fourth, HIGHS)


@device_function
def _int4(words, at, piece, scale, low, out, place):
    pairs = ptx.local(4, u32)
    for i in range(4):
        code = u32(u32(words[at + piece] >> u32(4 * i)) & u32(0x000F000F))
        code = ptx.multiply_add_bf16x2(u32(code | u32(0x43004300)), ONE, u32(0xC300C300))
        pairs[i] = ptx.multiply_add_bf16x2(code, scale, low)
    _neighbours(out, place, pairs[0], pairs[1], pairs[2], pairs[3])


@device_function
def _mxfp4(words, at, piece, scale, low, out, place):
    pairs = ptx.local(4, u32)
    for i in range(4):
        code = u32(words[at + piece] >> u32(4 * i))
        bits = u32(
            u32((code & u32(0x00080008)) << u32(12)) | u32((code & u32(0x00070007)) << u32(6))
        )
        bits = ptx.multiply_add_bf16x2(bits, TO_126, MINUS_ZERO)
        pairs[i] = ptx.multiply_add_bf16x2(bits, scale, MINUS_ZERO)
    _neighbours(out, place, pairs[0], pairs[1], pairs[2], pairs[3])


_SCALES = {"int4": _pairs, "mxfp8": _powers, "mxfp4": _powers}
_WIDEN = {
    "bf16": _copy, "e4m3": _e4m3, "int8": _int8, "int4": _int4, "mxfp8": _mxfp8, "mxfp4": _mxfp4,
}  # fmt: skip


def reader(form: PageForm, most: int) -> Reader:
    """Make the reader of a form; `most`: pieces that a lane may have next to each other."""
    bits = FORMS[form.name]
    pieces = min(16 // bits, most, form.block // 8 or most)
    load = {16: _load16, 8: _load8, 4: _load4}[pieces * bits]
    return Reader(pieces, load, _SCALES.get(form.name, _no_scales), _WIDEN[form.name])


def row_bytes(form: PageForm, width: int) -> int:
    """Bytes of a vector's codes."""
    return width * FORMS[form.name] // 8


def scale_bytes(form: PageForm, width: int) -> int:
    """Bytes of a vector's scales; its low ends take as many."""
    if form.name in ("e4m3", "int8"):
        return 4
    each = {"int4": 2, "mxfp8": 1, "mxfp4": 1}.get(form.name, 0)
    return each * (width // form.block) if form.block else 0


def whole_scale(form: PageForm) -> bool:
    """Say whether a vector has one float32 scale, which the kernel applies."""
    return form.name in ("e4m3", "int8")
