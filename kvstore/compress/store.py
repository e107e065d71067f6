"""A store of which each head of each layer keeps the tokens that matter, in pages of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..errors import StepError
from ..select.selector import Selector
from ..spec import KVSpec, plan_pages
from ..step import check_rows
from .choice import Chooser, ModelFacts
from .coded import PageCoder, Tiers
from .compression import Compression, CompressionError, by_layer
from .lanes import LanePool, Lanes
from .layers import LayerKeeper
from .reader import KeptReader
from .scorers import Scorer
from .sequence import KeptSequence, KeptStep, listed
from .shard import Shard


class CompressedStore(KeptReader):
    """Keys and values of which little is kept, with the calls of `KVStore`; what is evicted is freed, not masked.

    A prompt is compressed layer by layer, right after the layer's attention: one layer at a time is whole. Tokens that
    are decoded are added, and chosen among again where the composition says `every`. Places in the text travel with
    the tokens: rows see of the tokens `[lo, hi)` of the text those that are kept.

    Args:
        spec: as of a `KVStore`; pages hold tokens of one head of one layer.
        scorer: which tokens stay, `"snapkv:budget=0.25"`, or a `Compression`.
        layers: layers with a composition of their own; None keeps all of a layer's tokens.
        device_bytes, num_pages: the most the pages may take, and pages to begin with.
        codec: how kept tokens are held in fewer bits: `"int4"`, tiers `"none@0.25|int8@0.5|int2"`, or `Tiers`. Prompts
            after the first are then kept whole, and coded as they grow old.
        facts: what scorers such as `expected`, `triattention` and `critical` know of the model.
        shard: the ranks that hold parts of the same sequences.
        selector: which of the kept tokens a step of one row a sequence reads, such as "rocket:budget=256"; default all.

    State: one lock around all calls.
    """

    def __init__(
        self,
        spec: KVSpec,
        scorer: str | Compression,
        layers: Mapping[int, str | Compression | None] | None = None,
        device_bytes: int | str | None = None,
        num_pages: int | None = None,
        codec: str | Tiers | None = None,
        facts: ModelFacts | None = None,
        shard: Shard | None = None,
        selector: str | Selector | None = None,
    ) -> None:
        if spec.shared_kv:
            raise CompressionError(
                "a latent that is key and value at once has no heads to choose for; use a KVStore"
            )
        self.spec, self.shard = spec, shard or Shard()
        self.what = by_layer(spec.layers, scorer, layers)
        kinds = [what.scorer for what in self.what if what is not None]
        self.selector = None if selector is None else _selector(selector, kinds)
        self.private = any(kind.private for kind in kinds)
        one = replace(spec, layers=1, kv_heads=1)
        first, most = plan_pages(one, device_bytes, num_pages, grow=True)
        self.pool = LanePool(one, first, most, any(kind.received for kind in kinds))
        chooser = Chooser(spec.layers, facts or ModelFacts(), self.shard)
        coder = _coder(spec, codec, self.what, self.selector)
        self.keeper = LayerKeeper(self.pool, self.what, chooser, coder)
        self._lock = threading.RLock()
        self._sequences: dict[int, KeptSequence] = {}
        self._next = 0

    def join(self, shard: Shard) -> None:
        """Keep a part of sequences that other ranks share; `parallelize` says which.

        Raises:
            StepError: if there are sequences already.
        """
        with self._lock:
            if self._sequences:
                raise StepError(f"{len(self._sequences)} sequences are open; join before the first")
            self.shard = shard
            chooser = replace(self.keeper.chooser, shard=shard)
            self.keeper = LayerKeeper(self.pool, self.what, chooser, self.keeper.coder)

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
            for seq in listed(seqs):
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
                gone = seq.tokens - length
                if self.keeper.coder is not None and any(c.loose < gone for c in seq.coded):
                    raise StepError(f"truncate to {length}: tokens from there on are coded already")
                for lanes, coded in zip(seq.lanes, seq.coded, strict=True):
                    self.pool.cut(lanes, length)
                    coded.loose -= gone if self.keeper.coder is not None else 0
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
            first = {at for at, seq in enumerate(step.seqs) if seq.text == 0}
            for at, seq in enumerate(step.seqs):
                seq.add(int(step.counts[at]), int(step.rows[at]))
                seq.step = None
            for layer in range(self.spec.layers):
                for at, seq in enumerate(step.seqs):
                    self.keeper.again(seq, layer)
                    if at not in first:
                        self.keeper.age(seq, layer, int(step.counts[at]))
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
                    seq.memory.clear()  # a selector may have seen the step's tokens
                    for lanes in seq.lanes:
                        self.pool.cut(lanes, seq.tokens)
            step.whole.clear()
            step.state = "aborted"

    # -- inside ------------------------------------------------------------------------------

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


def _coder(
    spec: KVSpec, codec: str | Tiers | None, what: Listing[Compression | None], selector: Selector | None
) -> PageCoder | None:  # fmt: skip
    """What codes pages; refuse what does not go with it.

    Raises:
        CompressionError: saying why.
    """
    if codec is None:
        return None
    tiers = Tiers.parse(codec) if isinstance(codec, str) else codec
    tiers.check(spec)
    if selector is not None:
        raise CompressionError(
            f"selector={selector} with codec={tiers}: coded pages are decoded whole at each step, so choosing among "
            "them saves nothing; use one of the two"
        )
    for own in what:
        if own is not None and own.cadence:
            raise CompressionError(
                f"{own} chooses again while decoding, and coded pages are not written again; use every=0"
            )
        if own is None and tiers.ranked:
            raise CompressionError(
                f"codec={tiers} ranks tokens, and a layer without scorer has no ranks; give it one, or a single codec"
            )
    return PageCoder(tiers, spec)


def _busy(seq: KeptSequence) -> StepError:
    return StepError(f"sequence {seq.number} has an open step; commit or abort it first")


def _selector(given: str | Selector, kinds: list[Scorer]) -> Selector:
    """Read a selector, or refuse one that does not go with what evicts.

    Raises:
        CompressionError: saying why.
    """
    # Not at the top of the file: one of the selectors scores prompts by a scorer of ours.
    from ..select.registry import find_selector

    selector = find_selector(given)
    if selector.across_layers:
        raise CompressionError(
            f"selector={selector} lets layers read what another layer chose, and layers that evict do "
            "not hold the same tokens; use a selector of single layers such as rocket or quest, or a KVStore"
        )
    if selector.queries(1 << 40):
        raise CompressionError(
            f"selector={selector} filters prompts that are kept whole; with a scorer use "
            "selector=rocket, or use a KVStore"
        )
    heard = [kind for kind in kinds if kind.received]
    if heard:
        raise CompressionError(
            f"selector={selector} with {heard[0]}: it counts the attention that every token receives, and a "
            "selector reads only some; use another scorer, or no selector"
        )
    return selector
