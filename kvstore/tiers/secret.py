"""The key of a directory's prefix hashes, kept beside its pages, so that the next process finds them."""

from __future__ import annotations

import contextlib
import os

import xxhash

from .errors import TierError
from .folder import Folder

NAME, NEW = "secret", "secret.new"
SECRET_BYTES = 32
_SEAL_BYTES = 16
_COPIES = 2  # one flipped bit must not lose the pages of a whole directory


def directory_secret(folder: Folder, create: bool) -> bytes:
    """Give a directory's secret; make it if there is none that can be read.

    A new secret in an old directory leaves its pages unreachable: they are evicted in time.

    Args:
        create: whether this process is the directory's writer.

    Raises:
        TierError: if there is none and it may not be made.
    """
    with contextlib.suppress(FileNotFoundError):
        for sealed in _read(folder):
            if sealed[SECRET_BYTES:] == _seal(sealed[:SECRET_BYTES]):
                return sealed[:SECRET_BYTES]
    if not create:
        raise TierError(
            f"{folder.path} has no readable secret; its writer makes one, or give secret="
        )
    secret = os.urandom(SECRET_BYTES)
    data = (secret + _seal(secret)) * _COPIES
    handle = folder.create(NEW)
    try:
        if folder.write(handle, [data], 0) != len(data):
            raise TierError(f"{folder.path}: the secret could not be written whole")
        folder.sync(handle)
    finally:
        folder.close(handle)
    folder.rename(NEW, NAME)
    folder.sync_names()
    return secret


def _read(folder: Folder) -> list[bytes]:
    handle = folder.open(NAME)
    size = SECRET_BYTES + _SEAL_BYTES
    buffer = bytearray(size * _COPIES)
    try:
        folder.read(handle, [buffer], 0)
    finally:
        folder.close(handle)
    return [bytes(buffer[i * size : (i + 1) * size]) for i in range(_COPIES)]


def _seal(secret: bytes) -> bytes:
    return xxhash.xxh3_128_digest(b"plait secret 1" + secret)
