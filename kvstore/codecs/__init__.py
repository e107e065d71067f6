"""How pages are written down: for the cold tiers, for the wire, and for caches that keep fewer bits."""

from .adaquant import AdaQuant
from .allocation import allot_bits
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
from .kvtc import Kvtc
from .mixed import Mixed
from .registry import CODECS, find_codec, find_kv_codec
from .stream import CodedTokens
from .transforms import Balancer, Hadamard, KSort, Transform

__all__ = [
    "CODECS",
    "AdaQuant",
    "Balancer",
    "BytesToBytes",
    "Codec",
    "CodecError",
    "CodecPart",
    "CodedTokens",
    "Hadamard",
    "KSort",
    "KVCodec",
    "Kvtc",
    "Mixed",
    "PageLayout",
    "PageToBytes",
    "PageToPage",
    "Transform",
    "allot_bits",
    "bits_per_element",
    "find_codec",
    "find_kv_codec",
]
