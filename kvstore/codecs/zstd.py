"""zstd: bytes to fewer bytes, by the standard library where it has it, else by the package zstandard."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .codec import BytesToBytes, CodecError


def _library() -> tuple[Any, bool]:
    """The module, and whether it is the standard library's (Python 3.14 on)."""
    for name, standard in (("compression.zstd", True), ("zstandard", False)):
        try:
            return importlib.import_module(name), standard
        except ImportError:
            continue
    raise ImportError("the zstd codec needs Python 3.14 or: pip install zstandard")


def compress(data: np.ndarray, level: int) -> np.ndarray:
    """Make one zstd frame that says its own length."""
    library, standard = _library()
    frame = (
        library.compress(data.data, level) if standard else library.compress(data.tobytes(), level)
    )
    return np.frombuffer(frame, np.uint8)


def decompress(data: np.ndarray, max_bytes: int) -> np.ndarray:
    """Read one frame of at most `max_bytes`; a frame that claims more is refused before any memory is taken.

    Raises:
        CodecError: if it is not such a frame.
    """
    library, standard = _library()
    frame = data.tobytes()
    try:
        if standard:
            reader = library.ZstdDecompressor()
            content = reader.decompress(frame, max_bytes + 1)
            whole = reader.eof and not reader.unused_data
        else:
            claimed = library.frame_content_size(frame)  # -1: does not say; then we did not make it
            if not 0 <= claimed <= max_bytes:
                raise CodecError(f"zstd: a frame of {claimed} bytes where at most {max_bytes} fit")
            reader = library.ZstdDecompressor().decompressobj()
            content = reader.decompress(frame)
            whole = reader.eof and not reader.unused_data
    except library.ZstdError as error:
        raise CodecError(f"zstd: {error}") from error
    if not whole or len(content) > max_bytes:
        raise CodecError(f"zstd: not one whole frame of at most {max_bytes} bytes")
    return np.frombuffer(content, np.uint8)


@dataclass(frozen=True)
class Zstd(BytesToBytes):
    """One zstd frame."""

    name: ClassVar[str] = "zstd"
    level: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise ValueError(f"zstd level={self.level} must be 1 to 19")

    def max_bytes(self, length: int) -> int:
        """What zstd promises for bytes that cannot be made fewer, and room for its frame."""
        return length + length // 256 + 512

    def encode(self, data: np.ndarray) -> np.ndarray:
        """Compress."""
        return compress(data, self.level)

    def decode(self, data: np.ndarray, max_bytes: int) -> np.ndarray:
        """Decompress."""
        return decompress(data, max_bytes)
