"""Codecs by name: text to a chain."""

from __future__ import annotations

from ..named import read_named
from .adaquant import AdaQuant
from .bfp import Bfp
from .codec import BytesToBytes, Codec, CodecPart, KVCodec, PageToBytes, PageToPage
from .exponent import Exponent
from .integers import Int2, Int3, Int4
from .kivi import Kivi
from .microexponents import Mx4, Mx6, Mx9
from .mx import MxFp4, MxFp6, MxFp8, MxInt8
from .nvfp4 import Nvfp4
from .plain import CastBf16, Plain
from .scaled import Fp8, Int8
from .ternary import Ternary
from .transforms import Hadamard
from .turbo import Turbo
from .vidkv import VidKV
from .zstd import Zstd

CODECS: dict[str, type[CodecPart]] = {
    part.name: part
    for part in (
        *(Plain, CastBf16, Hadamard),
        *(Fp8, Int8, Int4, Int3, Int2, Kivi, AdaQuant, Turbo, Ternary, VidKV),
        *(MxFp8, MxFp6, MxFp4, MxInt8, Nvfp4, Mx9, Mx6, Mx4, Bfp),
        *(Exponent, Zstd),
    )
}
CALIBRATED = ("balancer", "ksort", "kvtc")  # hold numbers that no text says


def find_codec(text: str) -> Codec:
    """Read a chain such as `"int8"`, `"bf16+exponent"` or `"none+zstd:level=3"`.

    A chain that only packs bytes writes them plainly first: `"zstd"` is `"none+zstd"`.

    Raises:
        ValueError: if a name is unknown (it lists those that are known), an option is, or the order is wrong.
    """
    pieces = text.split("+")
    for name in (piece.strip().partition(":")[0] for piece in pieces):
        if name in CALIBRATED:
            raise ValueError(
                f"codec {name!r} is calibrated and has no text form: give a Codec with it"
            )
    parts = [read_named("codec", piece, CODECS) for piece in pieces]
    pages = [part for part in parts if isinstance(part, PageToPage)]
    writers = [part for part in parts if isinstance(part, PageToBytes)] or [Plain()]
    packers = [part for part in parts if isinstance(part, BytesToBytes)]
    in_order = [*pages, *writers, *packers]
    if len(writers) != 1 or [part for part in in_order if part in parts] != parts:
        raise ValueError(
            f"codec {text!r}: pages to pages first ({_known(PageToPage)}), then one to bytes "
            f"({_known(PageToBytes)}), then bytes to bytes ({_known(BytesToBytes)})"
        )
    return Codec(tuple(pages), writers[0], tuple(packers))


def find_kv_codec(text: str | KVCodec) -> KVCodec:
    """Read the codecs of keys and values: `"kivi:bits=2"` for both, `"int4/int2"` for K and V apart.

    Codecs that were calibrated have no text to be read: give the object, which comes back.

    Raises:
        ValueError: as `find_codec`.
    """
    if isinstance(text, KVCodec):
        return text
    keys, apart, values = text.partition("/")
    found = find_codec(keys)
    return KVCodec(found, find_codec(values) if apart else found.for_values())


def _known(kind: type[CodecPart]) -> str:
    return ", ".join(name for name, part in CODECS.items() if issubclass(part, kind))
