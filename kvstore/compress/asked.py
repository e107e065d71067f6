"""What a call asks of one layer of a compressed store, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..attention import ScoreOptions, merge_two
from .sequence import KeptSequence


@dataclass(frozen=True)
class AskedLayer:
    """Rows of some sequences that ask a layer, with bounds in the text, and what was answered so far.

    Shape: q `[rows, heads, head_dim]`; indptr `[seqs + 1]`; lo, hi `[rows]`; lengths `[seqs]`;
        o `[rows, heads, value_dim]`; lse `[rows, heads]`
    """

    seqs: list[KeptSequence]
    layer: int
    q: Tensor
    indptr: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    lengths: np.ndarray
    options: ScoreOptions
    o: Tensor
    lse: Tensor

    @classmethod
    def of(
        cls, seqs: list[KeptSequence], layer: int, q: Tensor, indptr: np.ndarray, lo: np.ndarray,
        hi: np.ndarray, lengths: np.ndarray, options: ScoreOptions, value_dim: int,
    ) -> AskedLayer:  # fmt: skip
        """Begin with nothing seen."""
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = q.new_zeros(*q.shape[:2], value_dim)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=work)
        return cls(seqs, layer, q, indptr, lo, hi, lengths, options, o, lse)

    @property
    def rows(self) -> np.ndarray:
        """How many each sequence asks."""
        return self.indptr[1:] - self.indptr[:-1]

    def of_sequence(self, at: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Give a sequence's q, lo and hi."""
        mine = self._slice(at)
        return self.q[mine], self.lo[mine], self.hi[mine]

    def sees_all(self, at: int) -> bool:
        """Say whether a sequence's first row sees the whole text."""
        row = int(self.indptr[at])
        return bool(self.lo[row] <= 0 and self.hi[row] >= self.lengths[at])

    def answer(self, at: int, part: tuple[Tensor, Tensor]) -> None:
        """Set o and lse of a sequence's rows."""
        mine = self._slice(at)
        self.o[mine], self.lse[mine] = part

    def add(self, at: int, part: tuple[Tensor, Tensor]) -> None:
        """Merge what other tokens answer a sequence's rows into o and lse, in the precision of lse."""
        mine, work = self._slice(at), self.lse.dtype
        own = self.o[mine].to(work), self.lse[mine]
        self.o[mine], self.lse[mine] = merge_two(own, (part[0].to(work), part[1].to(work)))

    def _slice(self, at: int) -> slice:
        return slice(int(self.indptr[at]), int(self.indptr[at + 1]))
