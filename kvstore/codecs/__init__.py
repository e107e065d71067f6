"""How pages are written down: for the cold tiers, for the wire, and for caches that keep fewer bits."""

from .codec import (
    BytesToBytes,
    Codec,
    CodecError,
    CodecPart,
    KVCodec,
    PageLayout,
    PageToBytes,
    PageToPage,
    bits_per_element,
)
from .registry import CODECS, find_codec, find_kv_codec
from .stream import CodedTokens

__all__ = [
    "CODECS",
    "BytesToBytes",
    "Codec",
    "CodecError",
    "CodecPart",
    "CodedTokens",
    "KVCodec",
    "PageLayout",
    "PageToBytes",
    "PageToPage",
    "bits_per_element",
    "find_codec",
    "find_kv_codec",
]
