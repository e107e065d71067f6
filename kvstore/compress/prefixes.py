"""What was kept of texts that other prompts may begin with, where keeping does not depend on the request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from .sequence import KeptSequence


class KeptPrefixes:
    """Sequences that stand where a prompt ended, found by its token ids; the longest unused goes first.

    State: not thread-safe; the store holds its lock around every call.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, tuple[np.ndarray, KeptSequence]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def sequences(self) -> list[KeptSequence]:
        """All of them."""
        return [seq for _, seq in self._held.values()]

    def find(self, key: bytes, ids: np.ndarray) -> KeptSequence | None:
        """The longest text that these ids begin with and do not end with; one token is left to compute."""
        lengths = {len(held) for held, _ in self._held.values()}
        for length in sorted((n for n in lengths if n < len(ids)), reverse=True):
            name = _digest(key, ids[:length])
            held = self._held.get(name)
            if held is not None and np.array_equal(held[0], ids[:length]):
                self._held.move_to_end(name)
                return held[1]
        return None

    def holds(self, key: bytes, ids: np.ndarray) -> bool:
        """Whether this very text is there."""
        return _digest(key, ids) in self._held

    def add(self, key: bytes, ids: np.ndarray, seq: KeptSequence) -> None:
        """Keep a sequence, whose lanes are its own, under the ids of its text."""
        self._held[_digest(key, ids)] = (ids.copy(), seq)

    def drop(self) -> KeptSequence | None:
        """Lose the one that was not used for longest."""
        return self._held.popitem(last=False)[1][1] if self._held else None


def _digest(key: bytes, ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), key=key, digest_size=32).digest()
