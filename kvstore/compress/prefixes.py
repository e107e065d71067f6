"""What was kept of texts that other prompts may begin with, where keeping does not depend on the request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from .sequence import KeptSequence

STRIDE = 256  # tokens from post to post


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


class Posts:
    """Keys under which a text stands in tiers, and the posts on the way to it that say how long such texts are.

    A post stands at every `STRIDE` tokens and names the texts that end before the next one, so that whoever knows only
    a longer prompt finds them.
    """

    def __init__(self, key: bytes, ids: np.ndarray) -> None:
        self.key, self.ids = key, ids
        state = hashlib.blake2b(key=key, digest_size=32)
        self._states = []
        data = ids.astype("<i4")
        for at in range(0, len(ids), STRIDE):
            self._states.append(state.copy())
            state.update(data[at : at + STRIDE].tobytes())

    @property
    def places(self) -> list[int]:
        """Where posts may stand, numbered."""
        return list(range(len(self._states)))

    @property
    def last(self) -> int:
        """The post that names the whole text."""
        return (len(self.ids) - 1) // STRIDE if len(self.ids) else 0

    def post(self, place: int) -> bytes:
        """The key of a post."""
        state = self._states[place].copy()
        state.update(b"post")
        return state.digest()

    def text(self, length: int) -> bytes:
        """The key of the text that ends after `length` tokens."""
        return _digest(self.key, self.ids[:length])


def _digest(key: bytes, ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), key=key, digest_size=32).digest()
