"""The reading half of the store: page tables, keys and values in order, attention in the pages."""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import Any

import numpy as np
from torch import Tensor

from ..cuda_kernels import Interleave
from .attention import (
    LayerPages,
    ScoreOptions,
    attend_pages,
    gather,
    row_bounds,
    row_pointers,
    with_sink,
)
from .errors import StepError
from .placement import Placement
from .pool import PagePool
from .select import Selector
from .select.attend import attend_selected, show_prompts
from .sequence import Sequence, listed
from .spec import KVSpec
from .step import Step
from .table import PageTable


class PageReader:
    """Reads committed tokens of sequences, and an open step's for whoever holds the step.

    State: `pool` and `spec` of the store, whose lock is held only to look up what to read.
    """

    spec: KVSpec
    pool: PagePool
    placement: Placement | None
    selector: Selector | None
    _lock: Any  # a threading.RLock, which is no class

    def wait(self, seqs: Sequence | Iterable[Sequence], seconds: float | None = None) -> bool:
        """Wait for what `open` fetches for these sequences; say whether nothing is under way any more."""
        until = None if seconds is None else time.monotonic() + seconds
        for seq in listed(seqs):
            if seq.fetch is None or self.placement is None:
                continue
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self.placement.fetcher.wait(seq.fetch, left):
                return False
            with self._lock:
                self.placement.settle(seq)
        return True

    def page_table(self, seqs: Sequence | Listing[Sequence], step: Step | None = None) -> PageTable:
        """Give the batch's page table (CSR, FlashInfer's words), with a step's tokens if given."""
        given = listed(seqs)
        if step is not None and given == list(step.seqs):
            step.require_open()
            return step.table
        self.wait(given)
        with self._lock:
            pages, lengths = [], []
            for seq in given:
                self._own(seq)
                inside = step if step is not None and seq.step is step else None
                at = -1 if inside is None else inside.find(seq)
                pages.append(seq.pages if inside is None else inside.table.pages(at))
                lengths.append(seq.tokens if inside is None else int(inside.table.lengths[at]))
            return PageTable(pages, np.array(lengths, np.int64), self.spec.page_tokens)

    def keys_values(
        self, seq: Sequence, layer: int, step: Step | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give one sequence's keys and values in order; a view where its pages are consecutive.

        A view shows later writes into its pages and must not be written to.

        Shape: -> `[tokens, kv_heads, head_dim]`, `[tokens, kv_heads, value_dim]`
        """
        step = step if step is not None else seq.step_alone()
        table = self.page_table(seq, step)
        self._require_written([seq], layer, step)
        with self._lock:
            return gather(self._layer(layer), table.pages(0), int(table.lengths[0]))

    def attend(
        self,
        seqs: Sequence | Listing[Sequence],
        layer: int,
        q: Tensor,
        q_indptr: Tensor | Listing[int] | None = None,
        lo: Tensor | None = None,
        hi: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        step: Step | None = None,
        alibi_slopes: Tensor | None = None,
        q_pos: Tensor | None = None,
        interleave: Interleave | None = None,
        sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend with ragged query rows to the sequences' keys and values, in their pages.

        Args:
            seqs: one sequence or a batch.
            q_indptr: rows of sequence s are `[q_indptr[s], q_indptr[s + 1])`. Default: all rows for
                one sequence; the step's token counts; else one row each.
            lo, hi: row r sees local tokens `[lo[r], hi[r])`, int64. Default lo 0; default hi causal,
                the last row of a sequence seeing all of it (right only for an uncut sequence).
            scale: default `head_dim ** -0.5`.
            softcap: scores become `softcap * tanh(score / softcap)`.
            step: also see this open step's tokens.
            alibi_slopes, q_pos: ALiBi `[heads]` and global row positions `[rows]`.
            interleave: gives keys their positions, and says to the store's selector how many share the sequence.
            sink: one logit per head in the denominator, then also in lse: on one shard only.

        Shape: q `[rows, heads, head_dim]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]`
            (natural log, float32; float64 for float64). A row that sees nothing: 0 and -inf.
        """
        if isinstance(seqs, Sequence) and step is None:
            step = seqs.step_alone()
        table = self.page_table(seqs, step)
        indptr = row_pointers(len(table.lengths), q, q_indptr, step)
        lo, hi = row_bounds(lo, hi, indptr, table.lengths, q.device)
        self._require_written(listed(seqs), layer, step)
        options = ScoreOptions(
            self.spec.head_dim**-0.5 if scale is None else scale,
            softcap,
            alibi_slopes,
            q_pos,
            interleave,
        )
        found = self._attend_selected(listed(seqs), layer, table, q, indptr, lo, hi, options)
        if found is None:
            found = attend_pages(self._layer(layer), table, q, indptr, lo, hi, options)
        return with_sink(*found, sink)

    def _attend_selected(
        self, seqs: list[Sequence], layer: int, table: PageTable, q: Tensor, indptr: np.ndarray,
        lo: Tensor, hi: Tensor, options: ScoreOptions,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Attend by the store's selector if there is one and each sequence has one row; else let it see the rows."""
        if self.selector is None or not seqs:
            return None
        memories = [seq.memory for seq in seqs]
        args = (self.selector, memories, self._layer(layer), layer, self.spec.layers, table, q)
        if (indptr[1:] - indptr[:-1] == 1).all():
            return attend_selected(*args, lo, hi, options)
        show_prompts(*args, indptr, options)
        return None

    def observe(self, seqs: Listing[Sequence], layer: int, q: Tensor, step: Step) -> None:
        """Let the store's selector see a prompt's queries, if attention to them is computed elsewhere.

        Shape: q `[rows, heads, head_dim]`, the rows of a step
        """
        if self.selector is None:
            return
        table = self.page_table(seqs, step)
        self._require_written(seqs, layer, step)
        indptr = row_pointers(len(table.lengths), q, None, step)
        options = ScoreOptions(self.spec.head_dim**-0.5)
        state = self._layer(layer)
        show_prompts(
            self.selector, [seq.memory for seq in seqs], state, layer, self.spec.layers, table, q,
            indptr, options,
        )  # fmt: skip

    def _layer(self, layer: int) -> LayerPages:
        with self._lock:  # not between the two halves of a growth
            return LayerPages(self.pool.keys[layer], self.pool.values[layer], self.spec.v_dim)

    def _require_written(self, seqs: Listing[Sequence], layer: int, step: Step | None) -> None:
        """Raise before a step's room is read that nobody wrote yet: it holds what others left there.

        Raises:
            StepError: saying so.
        """
        if step is None or layer in step.written or not step.num_tokens:
            return
        if any(seq.step is step for seq in seqs):
            raise StepError(f"layer {layer} of this step is not written yet: append to it first")

    def _own(self, seq: Sequence) -> None:
        seq.require_open()
        if seq.store is not self:
            raise ValueError(f"sequence {seq.number} belongs to another store")
