"""A store of which each head of each layer keeps the tokens that matter, in pages of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import Interleave
from ..attention import ScoreOptions, causal_bounds, past_end, row_pointers, with_sink
from ..errors import StepError
from ..spec import KVSpec, plan_pages
from ..step import check_rows
from .choice import Chooser, ModelFacts
from .compression import Compression, CompressionError, by_layer
from .lanes import LanePool, Lanes
from .layers import LayerKeeper
from .reading import attend_lanes, attend_whole, by_sequence, hear, lane_rows
from .report import check_lanes, report
from .sequence import KeptSequence, KeptStep
from .shard import Shard


class CompressedStore:
    """Keys and values of which little is kept, with the calls of `KVStore`; what is evicted is freed, not masked.

    A prompt is compressed layer by layer, right after the layer's attention: one layer at a time is whole. Tokens that
    are decoded are added, and chosen among again where the composition says `every`. Places in the text travel with
    the tokens: rows see of the tokens `[lo, hi)` of the text those that are kept.

    Args:
        spec: as of a `KVStore`; pages hold tokens of one head of one layer.
        scorer: which tokens stay, `"snapkv:budget=0.25"`, or a `Compression`.
        layers: layers with a composition of their own; None keeps all of a layer's tokens.
        device_bytes, num_pages: the most the pages may take, and pages to begin with.
        facts: what scorers such as `expected`, `triattention` and `critical` know of the model.
        shard: the ranks that hold parts of the same sequences.

    State: one lock around all calls.
    """

    def __init__(
        self,
        spec: KVSpec,
        scorer: str | Compression,
        layers: Mapping[int, str | Compression | None] | None = None,
        device_bytes: int | str | None = None,
        num_pages: int | None = None,
        facts: ModelFacts | None = None,
        shard: Shard | None = None,
    ) -> None:
        if spec.shared_kv:
            raise CompressionError(
                "a latent that is key and value at once has no heads to choose for; use a KVStore"
            )
        self.spec, self.shard = spec, shard or Shard()
        self.what = by_layer(spec.layers, scorer, layers)
        kinds = [what.scorer for what in self.what if what is not None]
        self.private = any(kind.private for kind in kinds)
        one = replace(spec, layers=1, kv_heads=1)
        first, most = plan_pages(one, device_bytes, num_pages, grow=True)
        self.pool = LanePool(one, first, most, any(kind.received for kind in kinds))
        chooser = Chooser(spec.layers, facts or ModelFacts(), self.shard)
        self.keeper = LayerKeeper(self.pool, self.what, chooser)
        self._lock = threading.RLock()
        self._sequences: dict[int, KeptSequence] = {}
        self._next = 0

    # -- sequences ---------------------------------------------------------------------------

    def open(self) -> KeptSequence:
        """Start a sequence."""
        return self.open_batch(1)[0]

    def open_batch(self, count: int) -> list[KeptSequence]:
        """Start some sequences."""
        with self._lock:
            return [self._open() for _ in range(count)]

    def _open(self) -> KeptSequence:
        seq = KeptSequence(self, self._next, self.spec.layers, self.spec.kv_heads)
        self._sequences[self._next] = seq
        self._next += 1
        return seq

    def close(self, seqs: KeptSequence | Iterable[KeptSequence]) -> None:
        """End sequences; pages nobody else holds become free."""
        with self._lock:
            for seq in _listed(seqs):
                seq.broken = False
                seq.require_open()
                if seq.step is not None:
                    if len(seq.step.seqs) > 1:
                        raise _busy(seq)
                    self.abort(seq.step)
                self._empty(seq)
                seq.closed = True
                del self._sequences[seq.number]

    def _empty(self, seq: KeptSequence) -> None:
        for layer, lanes in enumerate(seq.lanes):
            self.pool.release(lanes)
            seq.lanes[layer] = Lanes.empty(self.spec.kv_heads)
        seq.forget()

    def fork(self, seq: KeptSequence) -> KeptSequence:
        """Start a sequence with what another kept, sharing its pages; whoever writes into one copies it."""
        with self._lock:
            self._idle(seq)
            twin = self._open()
            twin.copy(seq)
            twin.lanes = [self.pool.share(lanes) for lanes in seq.lanes]
            return twin

    def reorder(
        self, seqs: Listing[KeptSequence], indices: Listing[int] | Tensor
    ) -> list[KeptSequence]:
        """Give the sequences `seqs[i] for i in indices` (beam search), sharing pages; see `KVStore.reorder`.

        Raises:
            IndexError: if an index names no sequence; nothing is changed.
        """
        order = [int(i) for i in indices]
        with self._lock:
            for seq in seqs:
                self._idle(seq)
            if any(not 0 <= i < len(seqs) for i in order):
                raise IndexError(f"reorder: indices {order} must be in [0, {len(seqs)})")
            first = {i: at for at, i in reversed(list(enumerate(order)))}
            out = [seqs[i] if first[i] == at else self.fork(seqs[i]) for at, i in enumerate(order)]
            self.close([seq for i, seq in enumerate(seqs) if i not in first])
            return out

    def truncate(self, seq: KeptSequence, length: int) -> None:
        """Forget the tokens from `length` on.

        Raises:
            StepError: if tokens were chosen with those in sight: what was evicted for them does not come back.
            ValueError: if the sequence is shorter than `length`.
        """
        with self._lock:
            self._idle(seq)
            if not 0 <= length <= seq.tokens:
                raise ValueError(
                    f"truncate to {length}: sequence {seq.number} has {seq.tokens} tokens"
                )
            if length == 0:
                self._empty(seq)
            elif length < seq.tokens:
                if self.shard.rule.shards > 1:
                    raise StepError("a compressed sequence cut over kvp ranks cannot be cropped")
                if length < max(seq.chosen):
                    raise StepError(
                        f"truncate to {length}: tokens were evicted at {max(seq.chosen)}, with those to be forgotten "
                        "in sight, and do not come back; use a KVStore for speculation"
                    )
                for lanes in seq.lanes:
                    self.pool.cut(lanes, length)
                seq.cut(length)

    # -- writing -----------------------------------------------------------------------------

    def reserve(
        self,
        seqs: Listing[KeptSequence],
        num_tokens: Listing[int] | int,
        rows: Listing[int] | None = None,
    ) -> KeptStep:
        """Begin a step of so many more tokens of each sequence; more than one is a prompt.

        Args:
            rows: new tokens over all kvp ranks, where `num_tokens` are this rank's.

        Raises:
            StepError: if a sequence already has an open step, or is named twice.
        """
        given = [num_tokens] * len(seqs) if isinstance(num_tokens, int) else list(num_tokens)
        counts = np.asarray(given, np.int64).reshape(-1)
        new = counts if rows is None else np.asarray(rows, np.int64)
        if len(counts) != len(seqs) or len(new) != len(seqs) or (counts < 0).any():
            raise ValueError(
                f"reserve: {len(seqs)} sequences need as many token counts >= 0, got {counts.tolist()}"
            )
        with self._lock:
            for seq in seqs:
                self._idle(seq)
            if len({seq.number for seq in seqs}) < len(seqs):
                raise StepError("reserve: a sequence is named twice; give each once")
            step = KeptStep(seqs, counts, new)
            for seq in seqs:
                seq.step = step
            return step

    def append(
        self, step: KeptStep | KeptSequence, layer: int, k: Tensor, v: Tensor | None = None
    ) -> None:
        """Write one layer's keys and values; see `KVStore.append`. A first prompt waits for its attention.

        Raises:
            PoolExhausted: if the pages do not suffice; abort the step.
        """
        if isinstance(step, KeptSequence):
            step = step.step or self.reserve([step], [k.shape[0]])
        step.require_open()
        pieces = check_rows(self.spec, step.num_tokens, layer, k, v)
        with self._lock:
            if layer in step.written:
                raise StepError(f"layer {layer} of this step is already written")
            step.written.add(layer)
            sizes = step.counts.tolist()
            ks, vs = (piece.split(sizes) for piece in pieces)
            for at, seq in enumerate(step.seqs):
                if seq.text == 0:
                    step.whole[at, layer] = (ks[at], vs[at])
                else:
                    places = np.arange(seq.tokens, seq.tokens + sizes[at])
                    self.pool.append(seq.lanes[layer], ks[at], vs[at], places)

    def commit(self, step: KeptStep | KeptSequence) -> None:
        """Make a step's tokens part of their sequences; choose again where it is time.

        Raises:
            StepError: if a layer was not written, or its queries were not seen (`attend` or `finish`).
        """
        step = self._step_of(step)
        with self._lock:
            step.require_open()
            asked = {at for at, rows in enumerate(step.rows) if rows}
            for layer in range(self.spec.layers):
                if asked and (layer not in step.written or asked - step.done.get(layer, set())):
                    raise StepError(
                        f"commit: layer {layer} is not written, or its queries were not seen; append it and attend, "
                        "or abort"
                    )
            for at, seq in enumerate(step.seqs):
                seq.add(int(step.counts[at]), int(step.rows[at]))
                seq.step = None
            for layer in range(self.spec.layers):
                for seq in step.seqs:
                    self.keeper.again(seq, layer)
            step.state = "committed"

    def abort(self, step: KeptStep | KeptSequence) -> None:
        """Drop a step. A later prompt that had begun to choose cannot be undone: its sequence can only be closed."""
        step = self._step_of(step)
        with self._lock:
            step.require_open()
            for at, seq in enumerate(step.seqs):
                seq.step = None
                if seq.text == 0:
                    self._empty(seq)
                elif step.rows[at] > 1 and any(at in done for done in step.done.values()):
                    seq.broken = True
                else:
                    for lanes in seq.lanes:
                        self.pool.cut(lanes, seq.tokens)
            step.whole.clear()
            step.state = "aborted"

    # -- reading -----------------------------------------------------------------------------

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
        given = _listed(seqs)
        if step is None and len(given) == 1 and given[0].step is not None:
            step = given[0].step if len(given[0].step.seqs) == 1 else None
        lengths = np.array([seq.tokens for seq in given])
        if step is not None:
            lengths = lengths + [int(step.counts[step.seqs.index(seq)]) for seq in given]
            if q_indptr is None:
                q_indptr = np.concatenate([[0], np.cumsum(self._rows_of(given, step))]).tolist()
        indptr = row_pointers(len(given), q, q_indptr, None)
        if hi is None:
            high = causal_bounds(indptr, lengths)
        elif past_end(hi, indptr, lengths):
            raise ValueError("attend: hi reaches past a sequence's end (did you forget step=?)")
        else:
            high = hi.cpu().numpy()
        low = np.zeros_like(high) if lo is None else lo.clamp(min=0).cpu().numpy()
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
        index = np.flatnonzero(np.isin(np.repeat(np.arange(len(seqs)), rows), paged))
        if len(index):
            at = torch.from_numpy(index).to(q.device)
            asked = lane_rows(
                self.pool, [seqs[i].lanes[layer] for i in paged], lengths[paged], q[at],
                rows[paged], lo[index], hi[index],
            )  # fmt: skip
            parts = attend_lanes(self.pool, asked, options)
            what = self.what[layer]
            if step is not None and what is not None and what.scorer.received:
                hear(self.pool, asked, parts[1], options.scale, self.shard)
            heads = self.spec.kv_heads
            o[at], lse[at] = (by_sequence(part, rows[paged], heads) for part in parts)
        return o, lse

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

    # -- accounts ----------------------------------------------------------------------------

    def report(self) -> dict[str, float]:
        """Say what is kept and what it takes; see `report.report`."""
        with self._lock:
            return report(self.spec, self.pool, list(self._sequences.values()))

    def check_integrity(self) -> None:
        """Prove that pages, counts and places tell one story.

        Raises:
            IntegrityError: naming what does not hold.
        """
        with self._lock:
            check_lanes(self.pool, list(self._sequences.values()))

    def _rows_of(self, seqs: Listing[KeptSequence], step: KeptStep) -> list[int]:
        return [int(step.rows[step.seqs.index(seq)]) for seq in seqs]

    def _step_of(self, step: KeptStep | KeptSequence) -> KeptStep:
        if isinstance(step, KeptStep):
            return step
        if step.step is None:
            raise StepError(f"sequence {step.number} has no open step; append or reserve first")
        return step.step

    def _idle(self, seq: KeptSequence) -> None:
        seq.require_open()
        if seq.store is not self:
            raise ValueError(f"sequence {seq.number} belongs to another store")
        if seq.step is not None:
            raise _busy(seq)


def _busy(seq: KeptSequence) -> StepError:
    return StepError(f"sequence {seq.number} has an open step; commit or abort it first")


def _listed(seqs: KeptSequence | Iterable[KeptSequence]) -> list[KeptSequence]:
    return [seqs] if isinstance(seqs, KeptSequence) else list(seqs)
