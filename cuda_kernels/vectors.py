"""Words of the CPU kernels that are written as vectors: what they ask of LLVM's builder, said once.

An address is an integer. Where a kind is asked for, that of a number or of a vector will do.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

intrinsic: Any = numba_intrinsic  # its signature in Python is not the one it compiles
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
LINE = 64  # bytes of a cache line
UPPER = 0xFFFF0000  # half of a word


def vector(kind: Any, lanes: int | None) -> Any:
    return kind if lanes is None else ir.VectorType(kind, lanes)


def ints(bits: int, lanes: int | None = None) -> Any:
    return vector(ir.IntType(bits), lanes)


def floats(bits: int, lanes: int | None = None) -> Any:
    return vector({16: ir.HalfType(), 32: ir.FloatType(), 64: ir.DoubleType()}[bits], lanes)


def same(kind: Any, number: float) -> Any:
    """A constant, in all lanes."""
    lanes = _lanes(kind)
    return kind(number if lanes is None else [number] * lanes)


def load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def load_wide(builder: Any, address: Any, element: Any, lanes: int) -> Any:
    """Load elements of an array as `widen` gives them."""
    if element == types.uint16:
        return widened(builder, load(builder, address, ints(16, lanes)))
    held = load(builder, address, floats(element.bitwidth, lanes))
    return builder.fpext(held, floats(32, lanes)) if element == types.int16 else held


def store(builder: Any, to: Any, held: Any) -> None:
    builder.store(held, builder.inttoptr(to, held.type.as_pointer()), align=1)


def store_past(builder: Any, to: Any, held: Any, align: int) -> None:
    """Store past the cache, to a multiple of `align`; see `fence`."""
    stored = builder.store(held, builder.inttoptr(to, held.type.as_pointer()), align=align)
    stored.set_metadata("nontemporal", builder.module.add_metadata([ints(32)(1)]))


def fetch(builder: Any, address: Any, n_bytes: int) -> None:
    """Have lines brought into the second cache; an address without memory does no harm."""
    byte, word = ints(8).as_pointer(), ints(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    for line in range(0, n_bytes, LINE):
        place = builder.inttoptr(builder.add(address, address.type(line)), byte)
        builder.call(prefetch, [place, word(0), word(2), word(1)])  # to read, of data


def moved(builder: Any, address: Any, index: Any, step: int) -> Any:
    """An address `index` steps of so many bytes on."""
    return builder.add(address, builder.mul(index, index.type(step)))


def shuffled(builder: Any, places: Sequence[int], a: Any, b: Any = None) -> Any:
    """Lanes of a, then b, by their places."""
    b = a.type(ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, b, ints(32, len(places))(list(places)))


def spread(builder: Any, number: Any, kind: Any) -> Any:
    """One number in all lanes of a vector."""
    one = builder.insert_element(kind(ir.Undefined), number, ints(32)(0))
    return shuffled(builder, [0] * kind.count, one)


def widened(builder: Any, shorts: Any) -> Any:
    """bfloat16 as float32."""
    lanes = _lanes(shorts.type)
    words = builder.zext(shorts, ints(32, lanes))
    return builder.bitcast(builder.shl(words, same(words.type, 16)), floats(32, lanes))


def rounded(builder: Any, held: Any) -> Any:
    """float32 as words whose upper half is the nearest bfloat16, ties to even; of NaN if its last bits are zeros."""
    bits = builder.bitcast(held, ints(32, _lanes(held.type)))
    odd = builder.and_(builder.lshr(bits, same(bits.type, 16)), same(bits.type, 1))
    return builder.add(builder.add(bits, same(bits.type, 0x7FFF)), odd)


def parted(builder: Any, words: Any) -> list[Any]:
    """Two bfloat16 a word as two vectors of float32: those of even and of odd places."""
    even = builder.shl(words, same(words.type, 16))
    odd = builder.and_(words, same(words.type, UPPER))
    return [builder.bitcast(half, floats(32, words.type.count)) for half in (even, odd)]


def joined(builder: Any, even: Any, odd: Any) -> Any:
    """The inverse of `parted`, rounded as `rounded`."""
    low, high = rounded(builder, even), rounded(builder, odd)
    low = builder.lshr(low, same(low.type, 16))
    return builder.or_(low, builder.and_(high, same(high.type, UPPER)))


def called(builder: Any, name: str, result: Any = None) -> Any:
    """Call one of LLVM's own functions, without arguments."""
    kind = ir.FunctionType(result or ir.VoidType(), [])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])


def called_at(builder: Any, address: Any, given: Sequence[Any]) -> Any:
    """Call a C function that returns an int by its address."""
    kind = ir.FunctionType(ints(32), [x.type for x in given])
    return builder.call(builder.inttoptr(address, kind.as_pointer()), given)


@intrinsic
def at(typingctx, address, like):
    """Make a pointer to elements like those of an array."""

    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), build


@intrinsic
def fence(typingctx):
    """Let what was stored past the cache be seen before what is stored later; a release alone does not on x86."""

    def build(context, builder, signature, args):
        if X86:
            called(builder, "llvm.x86.sse.sfence")
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


def _lanes(kind: Any) -> int | None:
    return getattr(kind, "count", None)
