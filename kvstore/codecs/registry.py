"""Codecs by name: text to a chain."""

from __future__ import annotations

from ..named import read_named
from .codec import BytesToBytes, Codec, CodecPart, PageToBytes, PageToPage
from .exponent import Exponent
from .plain import CastBf16, Plain
from .scaled import Fp8, Int8
from .zstd import Zstd

CODECS: dict[str, type[CodecPart]] = {
    part.name: part for part in (Plain, CastBf16, Fp8, Int8, Exponent, Zstd)
}


def find_codec(text: str) -> Codec:
    """Read a chain such as `"int8"`, `"bf16+exponent"` or `"none+zstd:level=3"`.

    A chain that only packs bytes writes them plainly first: `"zstd"` is `"none+zstd"`.

    Raises:
        ValueError: if a name is unknown (it lists those that are known), an option is, or the order is wrong.
    """
    parts = [read_named("codec", piece, CODECS) for piece in text.split("+")]
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


def _known(kind: type[CodecPart]) -> str:
    return ", ".join(name for name, part in CODECS.items() if issubclass(part, kind))
