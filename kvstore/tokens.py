"""Token ids of a sequence, and the running hash of its pages."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Listing
from typing import Any

import numpy as np
from torch import Tensor

TokenIds = Listing[int] | np.ndarray | Tensor

_MOST = 2**31 - 1


def as_token_ids(ids: TokenIds) -> np.ndarray:
    """Give token ids as one row of int32.

    Raises:
        ValueError: if they are no row of whole numbers in `[0, 2**31)`.
    """
    if isinstance(ids, list | tuple):
        try:
            given = np.frombuffer(array("q", ids), np.int64)
        except (TypeError, OverflowError):
            raise ValueError("token ids must be whole numbers in [0, 2**31)") from None
    else:
        given = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if given.ndim != 1:
        raise ValueError(f"token ids must be one row, got shape {list(given.shape)}")
    if given.dtype.kind not in "iu":
        if given.size:
            raise ValueError(f"token ids must be whole numbers, got {given.dtype}")
        given = given.astype(np.int64)
    if given.size and (given.min() < 0 or given.max() > _MOST):
        raise ValueError("token ids must be in [0, 2**31)")
    return np.ascontiguousarray(given, np.int32)


def page_hasher(key: bytes) -> Any:
    """Start the keyed hash of a prefix; BLAKE2b-256 of the ids as little-endian int32."""
    return hashlib.blake2b(key=key, digest_size=32)


def update(hasher: Any, ids: np.ndarray) -> None:
    """Feed token ids to a hash."""
    hasher.update(ids.astype("<i4", copy=False).tobytes())


def digest_words(hasher: Any) -> np.ndarray:
    """Give a hash's value so far as `[4]` uint64; the hash may go on."""
    return np.frombuffer(hasher.digest(), np.uint64)


class History:
    """The token ids of one sequence as far as they were told, and how far they are hashed and indexed.

    Attributes:
        key: the tenant's hash key.
        indexed: leading full pages of the sequence that are the index's own.
    """

    __slots__ = ("_hashed", "_hasher", "_ids", "_size", "indexed", "key", "known")

    def __init__(self, key: bytes, ids: np.ndarray, page_tokens: int) -> None:
        self.key = key
        self._ids = ids.copy()  # the caller's array is the caller's
        self.known = len(ids)
        self._size = page_tokens
        self._hasher: Any = None
        self._hashed = 0  # tokens the hasher has seen: whole pages
        self.indexed = 0

    @property
    def ids(self) -> np.ndarray:
        """The ids told so far."""
        return self._ids[: self.known]

    def found(self, pages: int, hasher: Any) -> None:
        """Note that the first pages were found in the index, `hasher` having seen `pages` of them."""
        self.indexed, self._hasher, self._hashed = pages, hasher, pages * self._size

    def tell(self, ids: np.ndarray) -> None:
        """Add the ids of the next tokens."""
        known = self.known + len(ids)
        if known > len(self._ids):
            room = np.empty(max(known + 64, known * 5 // 4), np.int32)
            room[: self.known] = self.ids
            self._ids = room
        self._ids[self.known : known] = ids
        self.known = known

    def digests(self, first: int, stop: int, tail: int = 0) -> np.ndarray:
        """Hash pages `first` to `stop`, each with all before it, and `tail` tokens after them.

        Shape: -> `[stop - first (+ 1 with a tail), 4]` uint64
        """
        size = self._size
        if self._hasher is None or self._hashed > first * size:
            self._hasher, self._hashed = page_hasher(self.key), 0
        hasher = self._hasher
        update(hasher, self.ids[self._hashed : first * size])
        out = []
        for page in range(first, stop):
            update(hasher, self._ids[page * size : (page + 1) * size])
            out.append(hasher.digest())
        self._hashed = stop * size
        if tail:
            rest = hasher.copy()
            update(rest, self._ids[stop * size : stop * size + tail])
            out.append(rest.digest())
        return np.frombuffer(b"".join(out), np.uint64).reshape(-1, 4)

    def truncate(self, length: int) -> None:
        """Forget the ids from `length` on."""
        self.known = min(self.known, length)
        self.indexed = min(self.indexed, length // self._size)
        if self._hashed > length:
            self._hasher = None

    def copy(self) -> History:
        """Copy, for a fork."""
        twin = History(self.key, self.ids, self._size)
        hasher = None if self._hasher is None else self._hasher.copy()
        twin.found(self.indexed, hasher)
        twin._hashed = self._hashed
        return twin
