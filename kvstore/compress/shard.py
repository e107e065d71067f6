"""The ranks that hold parts of the same sequences, so that all of them keep what one process would keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...collectives import primitive
from ...collectives.primitive import Group
from ...cuda_kernels import Interleave


@dataclass(frozen=True)
class Shard:
    """Where this rank stands: which tokens are its own (`rule`, over `kvp`), and which heads (over `tp`).

    Tokens are scored by every kvp rank alike, from the keys of all: they are gathered for it, one layer at a time.
    """

    rule: Interleave = Interleave()  # noqa: RUF009 (a frozen value)
    kvp: Group = None
    tp: Group = None

    @property
    def tp_size(self) -> int:
        """Ranks that share the heads."""
        return 1 if self.tp is None else self.tp.size()

    @property
    def tp_rank(self) -> int:
        """Which of them this is."""
        return 0 if self.tp is None else self.tp.rank()

    def own(self, positions: np.ndarray) -> np.ndarray:
        """Say which positions of a text are this rank's."""
        return positions // self.rule.run % self.rule.shards == self.rule.shard

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Number this rank's own positions as it holds them; undoes `positions`."""
        turn = positions // (self.rule.run * self.rule.shards)
        return turn * self.rule.run + positions % self.rule.run

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Where this rank's tokens stand in the text."""
        return self.rule.positions(torch.from_numpy(places.astype(np.int64))).numpy()

    def gather(
        self, rows: list[Tensor], positions: list[np.ndarray]
    ) -> tuple[list[Tensor], list[np.ndarray]]:
        """Bring each head's rows of all kvp ranks together, in the order of the text.

        Shape: rows `[heads]` of `[own tokens, d]` -> `[heads]` of `[tokens, d]`
        Collective: kvp; two all-gathers: numbers of tokens, then rows with their positions, padded to the longest.
        """
        if self.kvp is None:
            return rows, positions
        ranks, width = self.kvp.size(), rows[0].shape[1]
        counts = torch.tensor([len(own) for own in positions])
        known = primitive.all_gather(counts[None], self.kvp)  # [ranks, heads]
        most = int(known.max())
        sent = rows[0].new_zeros(1, len(rows), most, width)
        places = torch.zeros(1, len(rows), most, dtype=torch.int64)
        for head, own in enumerate(rows):
            sent[0, head, : len(own)] = own
            places[0, head, : len(own)] = torch.from_numpy(positions[head].astype(np.int64))
        all_rows = primitive.all_gather(sent, self.kvp)
        all_places = primitive.all_gather(places, self.kvp)
        out_rows, out_places = [], []
        for head in range(len(rows)):
            pieces = [(r, int(known[r, head])) for r in range(ranks)]
            where = torch.cat([all_places[r, head, :n] for r, n in pieces])
            order = where.argsort()
            out_rows.append(torch.cat([all_rows[r, head, :n] for r, n in pieces])[order])
            out_places.append(where[order].numpy())
        return out_rows, out_places

    def all_heads(self, scores: list[Tensor]) -> tuple[list[Tensor], slice]:
        """Scores of the heads of all tp ranks, and which of them are this rank's.

        Collective: tp; two all-gathers.
        """
        if self.tp is None:
            return scores, slice(None)
        counts = torch.tensor([len(own) for own in scores])
        known = primitive.all_gather(counts, self.tp)
        most = int(known.max())
        sent = torch.stack([torch.nn.functional.pad(own, (0, most - len(own))) for own in scores])
        rows = primitive.all_gather(sent, self.tp)
        whole = [row[: int(count)] for row, count in zip(rows, known, strict=True)]
        first = self.tp_rank * len(scores)
        return whole, slice(first, first + len(scores))

    def mean_over_heads(self, scores: list[Tensor]) -> list[Tensor]:
        """Give all heads of the layer the mean of their scores, where a rank saw some of the heads only."""
        if self.tp is None:
            return scores
        whole, _ = self.all_heads(scores)
        return [torch.stack(whole).mean(0)] * len(scores)

    def all(self, yes: bool) -> bool:
        """Whether all ranks say yes. Collective: kvp and tp, one all-gather of a flag each."""
        return self._least(int(yes)) == 1

    def same(self, number: int) -> bool:
        """Whether all ranks say the same number. Collective: as `all`, twice."""
        return self._least(number) == -self._least(-number)

    def _least(self, number: int) -> int:
        for group in (self.kvp, self.tp):
            if group is not None:
                number = int(primitive.all_gather(torch.tensor([number]), group).min())
        return number

    def total(self, lse: Tensor) -> Tensor:
        """The lse over the keys of all kvp ranks. Collective: kvp, one all-gather."""
        return primitive.all_gather(lse[None], self.kvp).logsumexp(0)
