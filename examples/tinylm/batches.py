"""Training windows drawn from the documents, and the positions their tokens stand at."""

from __future__ import annotations

import random

import numpy as np
import torch
from bytes_tokenizer import BOS, EOS
from data import MODULES, REFERENCE, TESTS, Document
from torch import Tensor

# The reference is short and the best prose, so it is read several times over; tests are long
# and say little, so most of them are never read.
SHARES = {REFERENCE: 0.14, MODULES: 0.82, TESTS: 0.04}


class Windows:
    """Random windows over one long stream of documents per kind."""

    def __init__(self, train: list[Document], seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._streams = {
            kind: _stream([text for name, text in train if name.startswith(kind)], seed)
            for kind in SHARES
        }

    def draw(self, rows: int, length: int) -> Tensor:
        """Return ids of shape [rows, length + 1]: inputs and, one later, their targets."""
        kinds = self._random.choice(list(SHARES), size=rows, p=list(SHARES.values()))
        return torch.from_numpy(np.stack([self._window(kind, length) for kind in kinds]))

    def positions(self, rows: int, length: int, reach: int, stretched: float) -> Tensor:
        """Return positions of shape [rows, length], some rows leaping ahead to teach `reach`.

        A share `stretched` of the rows jumps forward once or twice at random places, so that
        tokens meet keys at distances up to `reach` although the window is shorter.
        """
        positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
        for row in positions:
            if reach > length and self._random.random() < stretched:
                for place in self._random.integers(1, length, size=2):
                    row[place:] += int(self._random.integers(0, (reach - length) // 2 + 1))
        return torch.from_numpy(positions)

    def _window(self, kind: str, length: int) -> np.ndarray:
        stream = self._streams[kind]
        start = int(self._random.integers(0, len(stream) - length))
        return stream[start : start + length + 1].astype(np.int64)


def _stream(texts: list[bytes], seed: int) -> np.ndarray:
    order = list(texts)
    random.Random(seed).shuffle(order)
    pieces = [[np.array([BOS]), np.frombuffer(text, np.uint8), np.array([EOS])] for text in order]
    return np.concatenate([part for piece in pieces for part in piece]).astype(np.uint16)
