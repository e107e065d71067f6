"""The reading half of a compressed store: attention to what is kept, the end of a layer, accounts."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import Interleave, merge_states
from ..attention import ScoreOptions, row_bounds, row_pointers, with_sink
from ..select.attend import attend_selected
from ..select.selector import Selector
from ..spec import KVSpec
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
        with self._lock:
            o, lse = self._attend(given, layer, q, indptr, low, high, lengths, options, step)
            if step is not None:
                self.finish(step, layer, q, options.scale, seqs=given)
        return with_sink(o, lse, sink)

    def _attend(
        self, seqs: list[KeptSequence], layer: int, q: Tensor, indptr: np.ndarray,
        lo: np.ndarray, hi: np.ndarray, lengths: np.ndarray, options: ScoreOptions,
        step: KeptStep | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Whole first prompts one by one, all others together in their pages."""
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = q.new_zeros(*q.shape[:2], self.spec.v_dim)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=work)
        paged = []
        for at, seq in enumerate(seqs):
            place = -1 if step is None else step.seqs.index(seq)
            whole = None if step is None else step.whole.get((place, layer))
            mine = slice(int(indptr[at]), int(indptr[at + 1]))
            if whole is None:
                paged.append(at)
            elif mine.stop > mine.start:
                o[mine], lse[mine] = attend_whole(*whole, q[mine], lo[mine], hi[mine], options)
        rows = indptr[1:] - indptr[:-1]
        if self.keeper.coder is not None and self.selector is not None:
            for at in [at for at in paged if rows[at] == 1]:
                row = int(indptr[at])
                if lo[row] <= 0 and hi[row] >= lengths[at]:
                    part = self._attend_chosen(seqs[at], layer, q[row], options)
                    if part is not None:
                        o[row], lse[row] = part
                        paged.remove(at)
        index = np.flatnonzero(np.isin(np.repeat(np.arange(len(seqs)), rows), paged))
        if len(index):
            at = torch.from_numpy(index).to(q.device)
            asked = lane_rows(
                self.pool, [seqs[i].lanes[layer] for i in paged], lengths[paged], q[at],
                rows[paged], lo[index], hi[index],
            )  # fmt: skip
            parts = self._attend_selected([seqs[i] for i in paged], layer, asked, options)
            parts = parts or attend_lanes(self.pool, asked, options)
            what = self.what[layer]
            if (
                step is not None
                and what is not None
                and what.hears(step.listens, bool((step.rows > 1).any()))
            ):
                hear(self.pool, asked, parts[1], options.scale, self.shard, what.scorer.waits)
            heads = self.spec.kv_heads
            o[at], lse[at] = (by_sequence(part, rows[paged], heads) for part in parts)
        if self.keeper.coder is not None:
            for i in paged:
                mine = slice(int(indptr[i]), int(indptr[i + 1]))
                ends = (q[mine], lo[mine], hi[mine], options)
                part = self.keeper.coder.layers[layer].attend(seqs[i].coded[layer], *ends)
                if part is not None and mine.stop > mine.start:
                    both = (
                        torch.stack([own[mine].to(lse.dtype), new.to(lse.dtype)])
                        for own, new in zip((o, lse), part, strict=True)
                    )
                    o[mine], lse[mine] = merge_states(*both)
        return o, lse

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
