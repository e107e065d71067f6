"""Byte-level token ids: a byte is its own id, and three marks follow the 256 bytes."""

from __future__ import annotations

from collections.abc import Iterable

BOS = 256
EOS = 257
PAD = 258
VOCAB_SIZE = 259


def encode(text: bytes | str) -> list[int]:
    """Return the ids of a text, led by the beginning-of-text mark."""
    data = text.encode() if isinstance(text, str) else text
    return [BOS, *data]


def decode(ids: Iterable[int]) -> str:
    """Return the text of ids; marks vanish and broken UTF-8 shows as replacement characters."""
    return bytes(i for i in ids if 0 <= i < BOS).decode(errors="replace")
