"""What the codecs' CUDA kernels share: division as IEEE says, small floats, and the bytes of a thread's codes.

The numbers are those of the CPU bit for bit (`minifloats.py`). A thread has 16 bytes of a page, so 4 or 8 codes, in two
words: of more than four bits a word holds four codes, of fewer the first holds all.
Bodies differ; how they load, agree on a largest element, place codes and are launched stands here once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant
from .gpu.ptx import device_function, f32, i32, u32, u64
from .gpu.vectors import VECTORS
from .minifloats import MINIFLOATS, rounding_of

Launch = tuple[Variant, int | tuple[int, int], tuple[float, ...]]  # variant, grid, arguments

INFINITE, NAN_BITS = 0x7F800000, 0x7FC00000
NANS = {torch.bfloat16: 0x7FC07FC0, torch.float16: 0x7E007E00, torch.float32: 0x7FC00000}


@device_function
def quotient(x, by, inverse):
    """x / by rounded as IEEE says, from an inverse rounded as well; `div.rn` would be a call."""
    near = f32(x * inverse)
    return ptx.multiply_add(ptx.multiply_add(f32(-by), near, x), inverse, near)


@device_function
def inverse_of(x):
    """1 / x rounded as IEEE says, of neither a subnormal nor what has a subnormal inverse."""
    near = ptx.reciprocal(x)
    return ptx.multiply_add(near, ptx.multiply_add(f32(-x), near, f32(1)), near)


@device_function
def root_of(x):
    """The square root as IEEE rounds it, of what is neither tiny nor huge; `sqrt.rn` would be a call."""
    near = ptx.rsqrt(x)
    root, half = f32(x * near), f32(near * f32(0.5))
    rest = ptx.multiply_add(f32(-root), half, f32(0.5))
    root, half = ptx.multiply_add(root, rest, root), ptx.multiply_add(half, rest, half)
    return ptx.multiply_add(ptx.multiply_add(f32(-root), root, x), half, root)


@device_function
def product(a, b):
    """a * b, rounded by itself: the compiler would fuse it with a sum that follows, and the CPU rounds twice.

    A zero keeps its sign because what is added is -0.
    """
    return ptx.multiply_add(a, b, f32(-0.0))


@device_function
def magnitude_bits(x):
    """Bits of |x|: as whole numbers they have the order of the magnitudes, NaN above all."""
    return u32(ptx.as_u32(x) & u32(0x7FFFFFFF))


@device_function
def power(field):
    """2 ** (field - 127) for a field of 0 to 254."""
    bits = u32(0x00400000)
    if field > i32(0):
        bits = u32(u32(field) << u32(23))
    return ptx.as_f32(bits)


def encoder(form: str) -> Callable[..., Any]:
    """Give what rounds a float32 to a code, as `minifloats.round_to` does."""
    kind, (lowest, largest, lift, _, _) = MINIFLOATS[form], map(int, rounding_of(form))
    mantissa_bits, sign_at = kind.mantissa_bits, kind.bits - 1

    @device_function
    def code_of(value):
        size = u32(min(magnitude_bits(value), u32(largest)))
        field = u32(max(u32(size >> u32(23)), u32(lowest)))
        inverse = ptx.as_f32(u32(u32(u32(lift) - field) << u32(23)))
        steps = u32(ptx.nearest(f32(ptx.as_f32(size) * inverse)))
        code = u32(steps + u32(u32(field - u32(lowest)) << u32(mantissa_bits)))
        return u32(code | u32(u32(ptx.as_u32(value) >> u32(31)) << u32(sign_at)))

    return code_of


def decoder(form: str) -> Callable[..., Any]:
    """Give what makes two float32 of two codes, the one in the low byte of a word and the one two bytes above it."""
    kind = MINIFLOATS[form]
    up, sign_up, sign = 10 - kind.mantissa_bits, 16 - kind.bits, 0x00010001 << (kind.bits - 1)
    size, bias = 0x00010001 * ((1 << (kind.bits - 1)) - 1), 2.0 ** (15 - kind.bias)
    beyond = kind.largest if form == "e4m3" else float("inf")  # other forms have no NaN or IEEE's

    @device_function
    def values_of(pair):
        half = u32(
            u32(u32(pair & u32(size)) << u32(up)) | u32(u32(pair & u32(sign)) << u32(sign_up))
        )
        low, high = f32(ptx.f16_low(half) * f32(bias)), f32(ptx.f16_high(half) * f32(bias))
        if ptx.magnitude(low) > f32(beyond):
            low = ptx.as_f32(u32(NAN_BITS))
        if ptx.magnitude(high) > f32(beyond):
            high = ptx.as_f32(u32(NAN_BITS))
        return low, high

    return values_of


def first_codes(width: int, bits: int) -> int:
    """Codes of a thread that lie in the first word."""
    return min(width, 4) if bits > 4 else min(width, 32 // bits)


def pair_at(width: int, bits: int) -> Callable[..., Any]:
    """Give what takes codes i and i + 1 of two words apart, for `decoder`; i is even."""
    first, mask = first_codes(width, bits), (1 << bits) - 1

    @device_function
    def pair(a, b, i):
        word = a if i < first else b
        at = (i * bits) if i < first else ((i - first) * bits)
        low, high = u32(u32(word >> u32(at)) & u32(mask)), u32(word >> u32(at + bits))
        return u32(low | u32(u32(high & u32(mask)) << u32(16)))

    return pair


def placer(width: int, bits: int) -> Callable[..., Any]:
    """Give what adds code i to the two words, in the order of `pair_at`."""
    first_of = first_codes(width, bits)

    @device_function
    def placed(first, second, i, code):
        if i < first_of:
            first = u32(first | (code << u32(i * bits)))
        else:
            second = u32(second | (code << u32((i - first_of) * bits)))
        return first, second

    return placed


def code_at(width: int, bits: int) -> Callable[..., Any]:
    """Give what takes code i of the two words."""
    first_of, mask = first_codes(width, bits), (1 << bits) - 1

    @device_function
    def code(first, second, i):
        held = first if i < first_of else second
        at = (i * bits) if i < first_of else ((i - first_of) * bits)
        return u32(u32(held >> u32(at)) & u32(mask))

    return code


def loader(dtype: torch.dtype, threads: int) -> Callable[..., Any]:
    """Give what reads this thread's 16 bytes of a page as numbers; the last ones where there are no more.

    Every lane then takes part in the shuffles; `inside` says who may write.
    """
    unpack = VECTORS[dtype].unpack

    @device_function
    def load(x, vectors, v):
        at = i32(ptx.block() * i32(threads) + ptx.thread())
        inside = at < vectors
        held = at if inside else i32(vectors - i32(1))
        a, b, c, d = ptx.ld16_once(x + u64(u32(held)) * u64(16))
        unpack(a, b, c, d, v, 0)
        return at, inside, held

    return load


def worst(width: int, lanes: int) -> Callable[..., Any]:
    """Give what finds the bits of the largest magnitude of what some lanes hold."""
    shift = (lanes - 1).bit_length()

    @device_function
    def worst_of(v):
        largest = u32(0)
        for i in range(width):
            largest = u32(max(largest, magnitude_bits(v[i])))
        for step in range(shift):
            largest = u32(max(largest, ptx.shuffle_xor_u32(largest, i32(1 << step))))
        return largest

    return worst_of


def lanes_of(dtype: torch.dtype, width: int) -> int:
    """Count the 16-byte pieces of so many numbers; 0 unless a power of two, to 32: what shuffles can join."""
    lanes, rest = divmod(width * dtype.itemsize, 16)
    return lanes if dtype in VECTORS and rest == 0 and lanes in (1, 2, 4, 8, 16, 32) else 0


def vector_launch(
    variant: Variant, page: Tensor, tensors: Sequence[Tensor], *numbers: float
) -> Launch:
    """Make the launch with a thread for 16 bytes of a contiguous page: addresses, their number, what else there is."""
    vectors = page.numel() * page.element_size() // 16
    places = (t.data_ptr() for t in tensors)
    return variant, -(-vectors // variant.threads), (*places, vectors, *numbers)


@device_function
def _store8(place, a, b):
    ptx.st8(place, a, b)


@device_function
def _load8(place):
    return ptx.ld8(place)


@device_function
def _store6(place, a, b):
    ptx.st2(place, u32(a & u32(0xFFFF)))
    ptx.st2(place + u64(2), u32(u32(a >> u32(16)) | u32(u32(b & u32(0xFF)) << u32(8))))
    ptx.st2(place + u64(4), u32(b >> u32(8)))


@device_function
def _load6(place):
    low, middle, high = ptx.ld2(place), ptx.ld2(place + u64(2)), ptx.ld2(place + u64(4))
    first = u32(low | u32(u32(middle & u32(0xFF)) << u32(16)))
    return first, u32(u32(middle >> u32(8)) | u32(high << u32(8)))


@device_function
def _store3(place, a, b):
    ptx.st1(place, u32(a & u32(0xFF)))
    ptx.st1(place + u64(1), u32(u32(a >> u32(8)) & u32(0xFF)))
    ptx.st1(place + u64(2), u32(a >> u32(16)))


@device_function
def _load3(place):
    low, middle, high = ptx.ld1(place), ptx.ld1(place + u64(1)), ptx.ld1(place + u64(2))
    return u32(low | u32(u32(middle << u32(8)) | u32(high << u32(16)))), u32(0)


@device_function
def _store5(place, a, b):
    word = u32(a | (b << u32(20)))
    for i in range(4):
        ptx.st1(place + u64(i), u32(u32(word >> u32(8 * i)) & u32(0xFF)))
    ptx.st1(place + u64(4), u32(b >> u32(12)))


@device_function
def _load5(place):
    word = u32(0)
    for i in range(4):
        word = u32(word | (ptx.ld1(place + u64(i)) << u32(8 * i)))
    above = u32(ptx.ld1(place + u64(4)) << u32(12))
    return u32(word & u32(0xFFFFF)), u32(u32(word >> u32(20)) | above)


def stores(size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Give what stores and loads so many bytes of codes, held in two words."""
    odd = {
        8: (_store8, _load8), 6: (_store6, _load6), 5: (_store5, _load5), 3: (_store3, _load3),
    }  # fmt: skip
    if size in odd:
        return odd[size]
    put, get = {1: (ptx.st1, ptx.ld1), 2: (ptx.st2, ptx.ld2), 4: (ptx.st4, ptx.ld4)}[size]

    @device_function
    def store(place, a, b):
        put(place, a)

    @device_function
    def load(place):
        return get(place), u32(0)

    return store, load
