"""The reading half of a compressed store: attention to what is kept, the end of a layer, accounts."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import Interleave
from ..attention import ScoreOptions, row_bounds, row_pointers, with_sink
from ..select.attend import attend_selected
from ..select.selector import Selector
from ..spec import KVSpec
from .asked import AskedLayer
from .chosen import ChosenReader
from .compression import Compression
from .lanes import LanePool
from .layers import LayerKeeper
from .prefixes import KeptPrefixes
from .reading import LaneRows, attend_lanes, attend_whole, by_sequence, hear, lane_rows, regions
from .report import check_lanes, report
from .sequence import KeptSequence, KeptStep, listed
from .shard import Shard


class KeptReader:
    """Reads what a `CompressedStore` keeps.

    State: of the store, under its lock.
    """

    spec: KVSpec
    shard: Shard
    what: tuple[Compression | None, ...]
    pool: LanePool
    keeper: LayerKeeper
    prefixes: KeptPrefixes
    selector: Selector | None
    _lock: Any  # a threading.RLock, which is no class
    _sequences: dict[int, KeptSequence]

    def attend(
        self,
        seqs: KeptSequence | Listing[KeptSequence],
        layer: int,
        q: Tensor,
        q_indptr: Tensor | Listing[int] | None = None,
        lo: Tensor | None = None,
        hi: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        step: KeptStep | None = None,
        interleave: Interleave | None = None,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend with ragged rows to what is kept; with a step, choose then what its prompts keep of this layer.

        As `KVStore.attend`; `lo` and `hi` count the text's tokens of this rank, the evicted included.

        Shape: q `[rows, heads, head_dim]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]`
        Collective: with a step and kvp ranks, see `finish`.
        """
        given = listed(seqs)
        if step is None and len(given) == 1 and given[0].step is not None:
            step = given[0].step if len(given[0].step.seqs) == 1 else None
        lengths = np.array([seq.tokens for seq in given])
        if step is not None:
            lengths = lengths + [int(step.counts[step.seqs.index(seq)]) for seq in given]
            if q_indptr is None:
                q_indptr = np.concatenate([[0], np.cumsum(self._rows_of(given, step))]).tolist()
        indptr = row_pointers(len(given), q, q_indptr, None)
        low, high = (b.cpu().numpy() for b in row_bounds(lo, hi, indptr, lengths, "cpu"))
        options = ScoreOptions(self.spec.head_dim**-0.5 if scale is None else scale, softcap)
        asked = AskedLayer.of(given, layer, q, indptr, low, high, lengths, options, self.spec.v_dim)
        with self._lock:
            paged = self._answer_whole(asked, step)
            paged = self._answer_chosen(asked, paged)
            self._answer_paged(asked, paged, step)
            self._answer_coded(asked, paged)
            if step is not None:
                self.finish(step, layer, q, options.scale, seqs=given)
        return with_sink(asked.o, asked.lse, sink)

    def _answer_whole(self, asked: AskedLayer, step: KeptStep | None) -> list[int]:
        """Answer first prompts, which are in no page yet, one by one; return which sequences are left."""
        paged = []
        for at, seq in enumerate(asked.seqs):
            place = -1 if step is None else step.seqs.index(seq)
            whole = None if step is None else step.whole.get((place, asked.layer))
            if whole is None:
                paged.append(at)
            elif asked.rows[at]:
                asked.answer(at, attend_whole(*whole, *asked.of_sequence(at), asked.options))
        return paged

    def _answer_chosen(self, asked: AskedLayer, paged: list[int]) -> list[int]:
        """Answer single rows from what the selector chooses of coded and exact pages; return which are left."""
        if self.keeper.coder is None or self.selector is None:
            return paged
        left = []
        for at in paged:
            part = None
            if asked.rows[at] == 1 and asked.sees_all(at):
                q = asked.q[int(asked.indptr[at])]
                part = self._attend_chosen(asked.seqs[at], asked.layer, q, asked.options)
            if part is None:
                left.append(at)
            else:
                asked.answer(at, (part[0][None], part[1][None]))
        return left

    def _answer_paged(self, asked: AskedLayer, paged: list[int], step: KeptStep | None) -> None:
        """Answer from exact pages, all sequences together; scorers that listen hear it."""
        rows = asked.rows[paged]
        mine = np.flatnonzero(np.isin(np.repeat(np.arange(len(asked.seqs)), asked.rows), paged))
        if not len(mine):
            return
        at, seqs = torch.from_numpy(mine).to(asked.q.device), [asked.seqs[i] for i in paged]
        lanes = lane_rows(
            self.pool, [seq.lanes[asked.layer] for seq in seqs], asked.lengths[paged],
            asked.q[at], rows, asked.lo[mine], asked.hi[mine],
        )  # fmt: skip
        parts = self._attend_selected(seqs, asked.layer, lanes, asked.options)
        parts = parts or attend_lanes(self.pool, lanes, asked.options)
        what = self.what[asked.layer]
        if (
            step is not None
            and what is not None
            and what.hears(step.listens, bool((step.rows > 1).any()))
        ):
            scale, waits = asked.options.scale, what.scorer.waits
            hear(self.pool, lanes, parts[1], scale, self.shard, waits)
        heads = self.spec.kv_heads
        asked.o[at], asked.lse[at] = (by_sequence(part, rows, heads) for part in parts)

    def _answer_coded(self, asked: AskedLayer, paged: list[int]) -> None:
        """Merge what coded pages answer into what exact ones did."""
        if self.keeper.coder is None:
            return
        layer = self.keeper.coder.layers[asked.layer]
        for at in paged:
            coded = asked.seqs[at].coded[asked.layer]
            part = layer.attend(coded, *asked.of_sequence(at), asked.options)
            if part is not None and asked.rows[at]:
                asked.add(at, part)

    def _attend_chosen(
        self, seq: KeptSequence, layer: int, q: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, Tensor] | None:
        """Attend to what the selector chooses of coded and exact pages; None if that is everything."""
        assert self.selector is not None
        assert self.keeper.coder is not None
        coder = self.keeper.coder.layers[layer]
        chosen = ChosenReader(self.selector, coder, self.pool, self.spec.layers)
        memory = seq.memory.setdefault(layer, {})
        return chosen.attend(
            memory, seq.lanes[layer], seq.coded[layer], layer, q, options, self.shard.rule.shards
        )

    def _attend_selected(
        self, seqs: list[KeptSequence], layer: int, asked: LaneRows, options: ScoreOptions
    ) -> tuple[Tensor, Tensor] | None:
        """Attend by the selector, which sees a lane as a sequence of one KV head; None if there is none, or prompts."""
        if (
            self.selector is None
            or self.keeper.coder is not None
            or (asked.indptr[1:] - asked.indptr[:-1] != 1).any()
        ):
            return None
        held = [seq.memory.setdefault(layer, {}) for seq in seqs]
        heads = range(self.spec.kv_heads)
        memories = [{layer: own.setdefault(head, {})} for own in held for head in heads]
        return attend_selected(
            self.selector, memories, regions(self.pool), layer, self.spec.layers, asked.table,
            asked.q, asked.lo, asked.hi, replace(options, interleave=self.shard.rule),
        )  # fmt: skip

    def finish(
        self,
        step: KeptStep,
        layer: int,
        q: Tensor,
        scale: float | None = None,
        seqs: Listing[KeptSequence] | None = None,
    ) -> None:
        """Say that a layer's attention is done: prompts keep what they choose, with their queries in sight.

        `attend` calls it; call it yourself where attention was computed elsewhere.

        Shape: q `[rows, heads, head_dim]` of the step's (or `seqs`') new tokens over all kvp ranks.
        Collective: over kvp, keys and values of this layer's prompts; see `Chooser` for tp.
        """
        given = list(step.seqs) if seqs is None else list(seqs)
        rows = self._rows_of(given, step)
        unit = self.spec.head_dim**-0.5  # scorers scale by this themselves
        bent = q if scale is None or scale == unit else q * (scale / unit)
        with self._lock:
            for seq, own in zip(given, bent.split(rows), strict=True):
                if len(own):
                    self.keeper.finish(step, step.seqs.index(seq), layer, own.detach())

    def report(self) -> dict[str, float]:
        """Say what is kept and what it takes; see `report.report`."""
        with self._lock:
            return report(
                self.spec, self.pool, list(self._sequences.values()), self.prefixes.sequences
            )

    def check_integrity(self) -> None:
        """Prove that pages, counts and places tell one story.

        Raises:
            IntegrityError: naming what does not hold.
        """
        with self._lock:
            check_lanes(self.pool, [*self._sequences.values(), *self.prefixes.sequences])

    def _rows_of(self, seqs: Listing[KeptSequence], step: KeptStep) -> list[int]:
        return [int(step.rows[step.seqs.index(seq)]) for seq in seqs]
