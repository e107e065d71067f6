"""The store: sequences of keys and values in pages, written step by step, read in place."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from .accounts import StoreAccounts
from .audit import busy
from .cache import PageCache
from .codecs import KVCodec, find_kv_codec
from .encoding import PageEncoding
from .errors import StepError
from .evict import EvictionPolicy, find_policy
from .identity import Identity, check_secret
from .placement import FetchRule, Placement, disk_secret, make_tiers
from .pool import PagePool
from .select import Selector, find_selector
from .sequence import Sequence, listed
from .spec import KVSpec, plan_pages
from .step import Step, check_rows, fit_ids, make_step
from .tiers import Tier, TierStack
from .tokens import History, TokenIds, as_token_ids

LAST_FLUSH = 10.0  # seconds for a store that is dropped, or left open at the end of the process


class KVStore(StoreAccounts):
    """A paged store of keys and values for one rank.

    One step of a model writes like this, pages being allocated once and not per layer:

        step = store.reserve(seqs, [1] * len(seqs))
        for layer in range(layers):
            store.append(step, layer, k, v)
            o, lse = store.attend(seqs, layer, q, step=step)
        store.commit(step)

    For a single sequence `append(seq, ...)`, `attend(seq, ...)` and `commit(seq)` reserve and
    close a step by themselves.

    Args:
        spec: layers, heads, dims, dtype, page size.
        device_bytes: the most the pages may take (`"4GiB"` or bytes); None: no limit.
        num_pages: pages to start with; default all that fit `device_bytes`, else a few.
        grow: double the region when it is full, up to `device_bytes`.
        evict: which cached pages go first: "lru", "s3fifo", "tinylfu", "cost" or an `EvictionPolicy`.
        identity: what pages are true for; see `Identity`.
        secret: key of the prefix hashes, 16 to 64 bytes; default the directory's own, else random. Give
            the same to stores that shall find each other's pages.
        host_bytes: memory for pages that the device has no room for.
        disk, disk_bytes: a directory for pages that outlive the process, and what it may take.
        disk_mode: "write" (one process at a time), or "read" to use what another one's directory holds.
        codec: how tiers keep pages: "exponent", "int8+zstd", "kivi:bits=4", "int4/int2" (K/V), a `KVCodec`.
        tiers: further tiers by name, slower than those; the store closes them.
        fetch: "sooner": what is computed sooner than fetched is not fetched; "always" fetches.
        selector: which tokens a step of one row a sequence reads, such as "recent:tokens=512"; default all.
        clock: the time that deadlines are in.

    State: one lock around metadata and writes; reads run outside it. Use a sequence from one
    thread at a time.
    """

    def __init__(
        self,
        spec: KVSpec,
        device_bytes: int | str | None = None,
        num_pages: int | None = None,
        grow: bool = True,
        evict: str | EvictionPolicy = "lru",
        identity: Identity | None = None,
        secret: bytes | None = None,
        host_bytes: int | str | None = None,
        disk: str | Path | None = None,
        disk_bytes: int | str | None = None,
        disk_mode: Literal["write", "read"] = "write",
        codec: str | KVCodec = "none",
        tiers: Mapping[str, Tier] | None = None,
        fetch: FetchRule = "sooner",
        selector: str | Selector | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.selector = None if selector is None else find_selector(selector)
        policy, chain = find_policy(evict), find_kv_codec(codec)
        given = None if secret is None else check_secret(secret)
        self._identity = replace(identity or Identity(), codec=str(chain)).digest(spec)
        num_pages, max_pages = plan_pages(spec, device_bytes, num_pages, grow)
        encoding = PageEncoding(spec, chain)
        with contextlib.ExitStack() as undo:
            below = make_tiers(
                encoding.form(self._identity),
                encoding.page_bytes,
                host_bytes,
                disk,
                disk_bytes,
                disk_mode,
                tiers,
            )
            for tier in below.values():
                undo.callback(tier.close)
            self._secret = given or disk_secret(below) or os.urandom(32)
            self.pool = PagePool(spec, num_pages)
            self.cache = PageCache(self.pool, policy, max_pages)
            self._lock = threading.RLock()
            self._sequences: dict[int, Sequence] = {}
            self._next = 0
            self.placement = None
            if below:
                self.placement = Placement(
                    self.cache, self._lock, TierStack(below), encoding, fetch, clock
                )
                self._end = weakref.finalize(self, self.placement.end, LAST_FLUSH)
            undo.pop_all()

    # -- sequences ---------------------------------------------------------------------------

    def open(
        self,
        token_ids: TokenIds | None = None,
        tenant: str | None = None,
        seconds: float | None = None,
    ) -> Sequence:
        """Start a sequence; with token ids, from the longest prefix of them that is cached in any tier.

        `seq.cached_tokens` says how many tokens that are: append the keys and values of the others
        only. It is at most one less than there are ids, since a model must compute the last token to
        go on. The ids are the key under which this sequence's own pages are found later.

        Pages that must come from a tier come in the background; `seq.cached_tokens`, `seq.wait` and every call
        that needs them wait, `seconds` at most from now on: what is not there then is not cached.

        Raises:
            ValueError: if the ids are no row of whole numbers in `[0, 2**31)`.
            TypeError: if the tenant is neither text nor None.
        """
        return self.open_batch([token_ids], tenant, seconds)[0]

    def open_batch(
        self,
        count: int | Listing[TokenIds | None],
        tenant: str | None = None,
        seconds: float | None = None,
    ) -> list[Sequence]:
        """Start several sequences: a number of empty ones, or one per row of token ids."""
        prompts = [None] * count if isinstance(count, int) else count
        ids = [None if row is None else as_token_ids(row) for row in prompts]
        key = self._key(tenant) if any(row is not None for row in ids) else b""
        with self._lock:
            seqs = [self._open(row, key, tenant) for row in ids]
        if self.placement is not None:
            for seq in seqs:
                self.placement.seek(seq, seconds)
        return seqs

    def _open(self, ids: np.ndarray | None, key: bytes, tenant: str | None) -> Sequence:
        seq = Sequence(self, self._next, tenant)
        if ids is not None:
            seq.history = History(key, ids, self.spec.page_tokens)
            seq.pages, seq.tokens = self.cache.pin(seq.history)
            seq.found_tokens = seq.tokens
        self._sequences[self._next] = seq
        self._next += 1
        return seq

    def tell(self, seq: Sequence, token_ids: TokenIds) -> None:
        """Say which tokens come after those whose ids are known: generated ones, as they come.

        Only pages whose ids are known can be found by others. Needed for tokens that were neither in
        `open` nor in `commit`.
        """
        ids = as_token_ids(token_ids)
        seq.wait()
        with self._lock:
            self._own(seq)
            self._tell(seq, ids)
            if seq.history is not None:
                seq.pages = self.cache.record(seq.history, seq.pages, seq.tokens)

    def _tell(self, seq: Sequence, ids: np.ndarray) -> None:
        if seq.history is None:
            seq.history = History(self._key(seq.tenant), ids, self.spec.page_tokens)
        else:
            seq.history.tell(ids)

    def close(self, seqs: Sequence | Iterable[Sequence]) -> None:
        """End sequences; pages nobody else holds become free, or cached if their ids are known.

        Raises:
            SequenceClosed: if one is closed already.
            StepError: if one has an open step with other sequences in it.
        """
        with self._lock:
            for seq in listed(seqs):
                seq.require_open()
                if seq.step is not None and len(seq.step.seqs) > 1:
                    raise busy(seq)
                if seq.step is not None:
                    self.abort(seq.step)
                if seq.fetch is not None and self.placement is not None:
                    self.placement.settle(seq)
                if seq.history is not None:
                    self.cache.record_tail(seq.history, seq.pages, seq.tokens)
                self.cache.release(seq.pages)
                seq.pages, seq.tokens, seq.closed = np.empty(0, np.int32), 0, True
                del self._sequences[seq.number]

    def fork(self, seq: Sequence) -> Sequence:
        """Start a sequence with the committed tokens of another, sharing its pages.

        Nothing is copied now; whoever first writes into a shared partial last page copies it.
        """
        seq.wait()
        with self._lock:
            seq.require_open()
            twin = self._open(None, b"", seq.tenant)
            self.pool.share(seq.pages)
            twin.history = None if seq.history is None else seq.history.copy()
            twin.pages, twin.tokens = seq.pages.copy(), seq.tokens
            twin.found_tokens = seq.found_tokens
            return twin

    def reorder(self, seqs: Listing[Sequence], indices: Listing[int] | Tensor) -> list[Sequence]:
        """Give the sequences `seqs[i] for i in indices` (beam search), sharing pages.

        The first use of a sequence keeps its handle, further uses fork it, unused ones are closed.

        Raises:
            IndexError: if an index names no sequence; nothing is changed.
        """
        order = [int(i) for i in indices]
        self.wait(seqs)
        with self._lock:
            for seq in seqs:
                seq.require_open()
                if seq.step is not None:
                    raise busy(seq)
            if any(not 0 <= i < len(seqs) for i in order):
                raise IndexError(f"reorder: indices {order} must be in [0, {len(seqs)})")
            used: set[int] = set()
            out: list[Sequence] = []
            for i in order:
                out.append(self.fork(seqs[i]) if i in used else seqs[i])
                used.add(i)
            self.close([seq for i, seq in enumerate(seqs) if i not in used])
            return out

    def truncate(self, seq: Sequence, length: int) -> None:
        """Forget the tokens and ids from `length` on (rejected speculation); give whole pages back.

        Raises:
            ValueError: if the sequence is shorter than `length`.
        """
        seq.wait()
        with self._lock:
            seq.require_open()
            if seq.step is not None:
                raise busy(seq)
            if not 0 <= length <= seq.tokens:
                raise ValueError(
                    f"truncate to {length}: sequence {seq.number} has {seq.tokens} tokens"
                )
            seq.memory.clear()
            keep = -(-length // self.spec.page_tokens)
            self.cache.release(seq.pages[keep:])
            seq.pages, seq.tokens = seq.pages[:keep].copy(), length
            if seq.history is not None:
                seq.history.truncate(length)
            seq.found_tokens = min(seq.found_tokens, length)

    # -- writing -----------------------------------------------------------------------------

    def reserve(self, seqs: Listing[Sequence], num_tokens: Listing[int] | int) -> Step:
        """Make room for `num_tokens[i]` more tokens of each sequence; allocate once for all layers.

        A partial last page that another sequence shares is copied here (copy-on-write).

        Raises:
            PoolExhausted: if the pages do not suffice; nothing is changed.
            StepError: if a sequence already has an open step, or is named twice.
        """
        given = [num_tokens] * len(seqs) if isinstance(num_tokens, int) else list(num_tokens)
        counts = np.asarray(given, np.int64).reshape(-1)
        if len(counts) != len(seqs) or (counts < 0).any():
            raise ValueError(
                f"reserve: {len(seqs)} sequences need as many token counts >= 0, got {counts.tolist()}"
            )
        self.wait(seqs)
        with self._lock:
            for seq in seqs:
                self._own(seq)
                if seq.step is not None:
                    raise busy(seq)
            if len({seq.number for seq in seqs}) < len(seqs):
                raise StepError("reserve: a sequence is named twice; give each once")
            step = make_step(self.pool, seqs, counts, self.cache.allocate)
            for seq in seqs:
                seq.step = step
            return step

    def append(self, step: Step | Sequence, layer: int, k: Tensor, v: Tensor | None = None) -> None:
        """Write one layer's keys and values of a step (all its sequences, end to end).

        Given a sequence instead of a step, its own step is used, opened at the first layer.

        Shape: k `[tokens, kv_heads, head_dim]`, v `[tokens, kv_heads, value_dim]`
            (None with `shared_kv`), tokens of all sequences in the step's order.

        Raises:
            ValueError: wrong shape, dtype, device or layer; nothing is written.
            StepError: if the step is closed or the layer was already written.
        """
        if isinstance(step, Sequence):
            step = step.step or self.reserve([step], [k.shape[0]])
        step.require_open()
        pieces = check_rows(self.spec, step.num_tokens, layer, k, v)
        with self._lock:  # a growing pool moves its memory: writes may not cross that
            step.require_open()
            if layer in step.written:
                raise StepError(f"layer {layer} of this step is already written")
            regions = (self.pool.keys[layer], self.pool.values[layer])
            for region, rows in zip(regions, pieces, strict=False):
                step.scatter(region, rows)
            step.written.add(layer)
            if self.placement is not None and len(step.written) == self.spec.layers:
                self.placement.computed(step)

    def commit(
        self, step: Step | Sequence, token_ids: TokenIds | Listing[TokenIds] | None = None
    ) -> None:
        """Make a step's tokens part of their sequences.

        Args:
            step: a step, or the sequence whose own it is.
            token_ids: the ids of the step's tokens, unless they were given to `open` or `tell`: one
                row for one sequence, else one row for each. A page that becomes full is then found by
                others; if its tokens are in the store already, the sequence takes over that page, and
                views of `keys_values` taken before are no longer its own.

        Raises:
            StepError: if a layer was not written, or the step is closed already.
            ValueError: if the ids do not fit the step; it stays open.
        """
        step = self._step_of(step)
        with self._lock:
            step.require_open()
            missing = sorted(set(range(self.spec.layers)) - step.written)
            if missing and step.num_tokens:
                raise StepError(f"commit: layers {missing} are not written; append them or abort")
            told = [] if token_ids is None else fit_ids(step, token_ids)
            self.pool.commit(step.pages)
            for at, seq in enumerate(step.seqs):
                swap = step.copied[at]
                seq.pages = step.table.pages(at).copy()
                seq.tokens = int(step.table.lengths[at])
                seq.step = None
                if swap is not None:
                    self.cache.release(np.array([swap[1]], np.int32))
                if told:
                    self._tell(seq, told[at])
                if seq.history is not None:
                    seq.pages = self.cache.record(seq.history, seq.pages, seq.tokens)
            step.state = "committed"

    def abort(self, step: Step | Sequence) -> None:
        """Drop a step: its sequences are as they were before `reserve`."""
        step = self._step_of(step)
        with self._lock:
            step.require_open()
            self.cache.release(step.pages)
            for seq in step.seqs:
                seq.step = None
                seq.memory.clear()  # a selector may have seen the step's tokens
            step.state = "aborted"

    def _step_of(self, step: Step | Sequence) -> Step:
        if isinstance(step, Step):
            return step
        step.require_open()
        if step.step is None:
            raise StepError(f"sequence {step.number} has no open step; append or reserve first")
        return step.step
