"""A store of which each head of each layer keeps the tokens that matter, in pages of its own."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import StepError
from ..identity import Identity, check_tenant, prefix_key
from ..placement import disk_secret, make_tiers
from ..select.selector import Selector
from ..spec import KVSpec, plan_pages
from ..step import check_rows
from ..tiers import Tier
from ..tokens import TokenIds, as_token_ids
from .choice import Chooser, ModelFacts
from .compose import check_facts, checked_windows, page_coder, selector_of
from .compression import Compression, CompressionError, by_layer
from .depot import CHUNK_BYTES, Depot
from .lanes import LanePool
from .layers import LayerKeeper
from .parking import Parking, busy
from .prefixes import KeptPrefixes
from .sequence import KeptSequence, KeptStep, listed
from .shard import Shard
from .tiers import Tiers


class CompressedStore(Parking):
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
        identity: what kept tokens are true for; see `Identity`.
        host_bytes: memory for what is parked, and for texts that prompts may begin with and the pool has no room for.
        disk, disk_bytes: a directory for them that outlives the process, of this rank alone, and what it may take.
        windows: how many tokens rows of a layer see, themselves included, of layers that keep no older ones.
        tiers: further tiers by name, slower than those, of pages of `Depot.CHUNK_BYTES`.

    Attributes:
        waits: some scorer chooses when `choose` is called, and not before.
        private: some scorer looks at queries, so that what is kept serves its own request only.

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
        identity: Identity | None = None,
        host_bytes: int | str | None = None,
        disk: str | Path | None = None,
        disk_bytes: int | str | None = None,
        tiers: Mapping[str, Tier] | None = None,
        windows: Mapping[int, int] | None = None,
    ) -> None:
        if spec.shared_kv:
            raise CompressionError(
                "a latent that is key and value at once has no heads to choose for; use a KVStore"
            )
        self.spec, self.shard = spec, shard or Shard()
        self.what = by_layer(spec.layers, scorer, layers)
        windows = checked_windows(spec.layers, windows)
        kinds = [what.scorer for what in self.what if what is not None]
        self.selector = None if selector is None else selector_of(selector, kinds)
        self.waits = any(kind.waits for kind in kinds)
        self.private = any(kind.private for kind in kinds)
        one = replace(spec, layers=1, kv_heads=1)
        first, most = plan_pages(one, device_bytes, num_pages, grow=True)
        self.pool = LanePool(one, first, most, any(kind.received for kind in kinds))
        coder = page_coder(spec, codec, self.what, self.selector)
        filled = any(what is not None and what.rule.by_loss for what in self.what)
        widths = coder.widths if coder is not None and filled else None
        check_facts(self.what, facts := facts or ModelFacts())
        chooser = Chooser(spec.layers, facts, self.shard, widths)
        self.keeper = LayerKeeper(self.pool, self.what, chooser, coder, windows)
        self._lock = threading.RLock()
        self._sequences: dict[int, KeptSequence] = {}
        self._next = 0
        self.prefixes = KeptPrefixes()
        held = "none" if coder is None else str(coder.tiers)
        said = "; ".join([held, *map(str, self.what), *map(str, sorted(windows.items()))])
        self._identity = replace(identity or Identity(), codec=said).digest(spec)
        form = Depot.form(self._identity)
        below = make_tiers(form, CHUNK_BYTES, host_bytes, disk, disk_bytes, "write", tiers)
        self._secret = disk_secret(below) or os.urandom(32)
        self.below = Depot(below) if below else None
        if self.below is not None:
            self._end = weakref.finalize(self, self.below.stack.close)
        self.pool.spare = self._spare

    def join(self, shard: Shard) -> None:
        """Keep a part of sequences that other ranks share; `parallelize` says which.

        Raises:
            StepError: if there are sequences already.
        """
        with self._lock:
            if self._sequences:
                raise StepError(f"{len(self._sequences)} sequences are open; join before the first")
            self.shard, self.keeper = shard, self.keeper.joined(shard)

    # -- sequences ---------------------------------------------------------------------------

    def open(self, token_ids: TokenIds | None = None, tenant: str | None = None) -> KeptSequence:
        """Start a sequence; see `open_batch`."""
        return self.open_batch([token_ids], tenant)[0]

    def open_batch(
        self, prompts: int | Listing[TokenIds | None], tenant: str | None = None
    ) -> list[KeptSequence]:
        """Start sequences: some empty ones, or one for each row of token ids.

        With ids, from what was kept of the longest text that an earlier sequence's prompt ended with and this one
        begins with (`cached_tokens`), unless the store is `private` or cut over kvp ranks.
        """
        rows = [None] * prompts if isinstance(prompts, int) else prompts
        ids = [None if row is None else as_token_ids(row) for row in rows]
        shared = not self.private and self.shard.rule.shards == 1
        key = prefix_key(self._secret, self._identity, check_tenant(tenant))
        with self._lock:
            return [self._open(row if shared else None, key) for row in ids]

    def _open(self, ids: np.ndarray | None = None, key: bytes = b"") -> KeptSequence:
        seq = self._made()
        self._sequences[seq.number] = seq
        found = None if ids is None else self._find(key, ids)
        if found is not None:
            self._share(found, seq)
            seq.cached_tokens = seq.tokens
        seq.ids, seq.key = ids, key
        return seq

    def _find(self, key: bytes, ids: np.ndarray) -> KeptSequence | None:
        """A text to go on from, here or below."""
        found = self.prefixes.find(key, ids)
        if found is not None or self.below is None:
            return found
        fetched = self._fetch(key, ids)
        if fetched is not None and fetched.ids is not None:
            self.prefixes.add(key, fetched.ids, fetched)
        return fetched

    def _share(self, seq: KeptSequence, twin: KeptSequence) -> None:
        twin.copy(seq)
        twin.lanes = [self.pool.share(lanes) for lanes in seq.lanes]

    def _spare(self) -> bool:
        """Move a text that no sequence stands on below, or lose it, to make room; False if there is none."""
        oldest = self.prefixes.drop()
        if oldest is not None:
            self._demote(oldest)
            self._empty(oldest)
        return oldest is not None

    def evict(self) -> int:
        """Free all texts that are kept for later prompts, to the tiers if there are any; return how many."""
        with self._lock:
            count = len(self.prefixes)
            while self._spare():
                pass
            return count

    def close(self, seqs: KeptSequence | Iterable[KeptSequence]) -> None:
        """End sequences; pages nobody else holds become free."""
        with self._lock:
            for seq in listed(seqs):
                seq.broken = False
                seq.require_open()
                if seq.step is not None:
                    if len(seq.step.seqs) > 1:
                        raise busy(seq)
                    self.abort(seq.step)
                self._empty(seq)
                seq.closed = True
                del self._sequences[seq.number]

    def fork(self, seq: KeptSequence) -> KeptSequence:
        """Start a sequence with what another kept, sharing its pages; whoever writes into one copies it."""
        with self._lock:
            self._idle(seq)
            twin = self._open()
            self._share(seq, twin)
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
                last = max(*seq.chosen, seq.left)
                if length < last:
                    raise StepError(
                        f"truncate to {length}: tokens were evicted at {last}, with those to be forgotten "
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
                self.keeper.slide(seq)
                if not self.waits:
                    self._remember(seq)
            for layer in range(self.spec.layers):
                for at, seq in enumerate(step.seqs):
                    self.keeper.again(seq, layer)
                    if at not in first:
                        self.keeper.age(seq, layer, int(step.counts[at]))
            step.state = "committed"

    def choose(self, seqs: KeptSequence | Listing[KeptSequence]) -> None:
        """Let scorers choose that wait to be told, such as KVzip after a reconstruction."""
        with self._lock:
            for seq in listed(seqs):
                self._idle(seq)
                for layer in range(self.spec.layers):
                    self.keeper.choose(seq, layer)
                self._remember(seq)

    def _remember(self, seq: KeptSequence) -> None:
        """Keep what stands at the end of a prompt whose ids are known, for prompts that begin with it."""
        if seq.ids is None or seq.text != seq.prompt or seq.text > len(seq.ids):
            return
        ids = seq.ids[: seq.text]
        if not self.prefixes.holds(seq.key, ids):
            twin = self._made()
            self._share(seq, twin)
            twin.ids, twin.key = ids.copy(), seq.key
            self.prefixes.add(seq.key, ids, twin)

    def abort(self, step: KeptStep | KeptSequence) -> None:
        """Drop a step. A later prompt that had begun to choose cannot be undone: its sequence can only be closed."""
        step = self._step_of(step)
        with self._lock:
            step.require_open()
            for at, seq in enumerate(step.seqs):
                seq.step = None
                if seq.text == 0:
                    self._empty(seq)
                elif at in step.evicted:
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
