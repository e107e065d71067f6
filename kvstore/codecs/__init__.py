"""How pages are written down for the cold tiers."""

from .codec import (
    BytesToBytes,
    Codec,
    CodecError,
    CodecPart,
    PageLayout,
    PageToBytes,
    PageToPage,
    bits_per_element,
)
from .registry import CODECS, find_codec

__all__ = [
    "CODECS",
    "BytesToBytes",
    "Codec",
    "CodecError",
    "CodecPart",
    "PageLayout",
    "PageToBytes",
    "PageToPage",
    "bits_per_element",
    "find_codec",
]
