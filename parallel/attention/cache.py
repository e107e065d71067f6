"""The KV cache that transformers models use under Helix: a ``Cache`` whose full-attention layers live in our store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ...kvstore import CompressedStore, KVStore
from ...kvstore.engines.compressed import repetitions
from ..errors import PlanError
from .helix import HelixLayer, HelixState


class PagedCacheLayer(CacheLayerMixin):
    """One full-attention layer of a ``PagedCache``; its tokens are in the store, this rank's share of them."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: PagedCache, layer: HelixLayer) -> None:
        super().__init__()
        self.cache = cache
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store was made with the cache."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append own tokens to the store and hand the new tokens on; attention finds the old ones in the store."""
        self.layer.write(
            self.layer.as_key(key_states, value_states), self.layer.as_value(value_states)
        )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        return self.cache.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class PagedCache(Cache):
    """A transformers cache whose keys and values are cut over the ranks of a Helix plan.

    Made by the model's forward or ``generate`` if no cache is given. Per rank it holds tp's share of the heads and the
    tokens the position rule gives this rank; ranks differ by at most ``interleave`` tokens per request. Sliding-window
    layers keep transformers' own layer. Padding is not stored.

    State: between ``begin`` and ``end`` of a forward the new tokens are a step of the store, visible to that step only.
    """

    def __init__(
        self,
        state: HelixState,
        store: KVStore | CompressedStore,
        windows: Sequence[int | None],
        layers: Sequence[HelixLayer | None],
    ) -> None:
        made: list[Any] = []
        for window, layer in zip(windows, layers, strict=True):
            if layer is not None:
                made.append(PagedCacheLayer(self, layer))
            else:
                made.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
        super().__init__(layers=made)
        self.state = state
        self.store = store
        self.seqs: list[Any] = []
        self.valid = np.zeros((0, 0), dtype=bool)
        self.write_step: Any = None
        self._listens = False

    @property
    def columns(self) -> int:
        """Columns of the batch seen so far, padding included."""
        return self.valid.shape[1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request, over all ranks."""
        return [int(n) for n in self.valid.sum(1)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that this rank holds in the store for these requests."""
        if isinstance(self.store, CompressedStore):
            return int(self.store.report()["held_bytes"])
        return sum(seq.length for seq in self.seqs) * self.store.spec.bytes_per_token

    def begin(self, batch: int, length: int, mask: np.ndarray | None, device: torch.device) -> None:
        """Open a step for ``length`` new columns; ``mask`` is over all columns, as transformers gives it."""
        # a forward that raised left its step open: its tokens were never committed
        if self.write_step is not None:
            self.store.abort(self.write_step)
            self.write_step = None
        if not self.seqs:
            self.seqs = self.store.open_batch(batch)
            self.valid = np.zeros((batch, 0), dtype=bool)
        if batch != len(self.seqs):
            raise ValueError(
                f"the cache holds {len(self.seqs)} requests, the input {batch}; use a new cache"
            )
        new = self._new_columns(batch, length, mask)
        self.state.begin(batch, length, self.lengths, new, self, device)
        step = self.state.running()
        if isinstance(self.store, CompressedStore):
            self.write_step = self.store.reserve(self.seqs, step.own_counts, step.counts)
            self.write_step.listens = self._listens
        else:
            self.write_step = self.store.reserve(self.seqs, step.own_counts)
        self._new = np.ones((batch, length), dtype=bool) if new is None else new

    def _new_columns(self, batch: int, length: int, mask: np.ndarray | None) -> np.ndarray | None:
        if mask is None:
            return None
        if mask.shape != (batch, self.columns + length):
            raise ValueError(
                f"attention_mask is {list(mask.shape)}; with {self.columns} cached columns and {length} new it must be "
                f"[{batch}, {self.columns + length}]"
            )
        if not np.array_equal(mask[:, : self.columns], self.valid):
            raise ValueError(
                "attention_mask hides or shows cached tokens differently than when they were cached"
            )
        new = mask[:, self.columns :]
        return None if new.all() else new

    def attended(self, layer: int, q: Tensor, scale: float | None) -> None:
        """Say that a prompt's attention was computed elsewhere: a compressed store chooses now.

        Shape: q `[rows, heads/tp, head_dim]`
        """
        if isinstance(self.store, CompressedStore):
            self.store.finish(self.write_step, layer, q, scale)

    def end(self) -> None:
        """Commit the step of a forward that returned."""
        if self.write_step is not None and self._listens:
            self.store.abort(self.write_step)
            self.write_step = None
        elif self.write_step is not None:
            self.store.commit(self.write_step)
            self.write_step = None
            self.valid = np.concatenate([self.valid, self._new], 1)
        # else the model would keep the pages of a cache that its owner dropped
        self.state.cache = None

    def reconstruct(
        self, model: Any, ids: Tensor, ask: Tensor | None = None, chunk: int = 2048
    ) -> None:
        """Let the model repeat its text and keep what it needed for that (KVzip); see `CompressedCache.reconstruct`.

        Raises:
            ValueError: if the store's scorers do not wait for it, or the text is not the one that is cached.
        Collective: forwards over all ranks, then as a choice after a prompt.
        """
        own = all(isinstance(layer, PagedCacheLayer) for layer in self.layers)
        store, same = self.store, ids.shape == self.valid.shape and bool(self.valid.all())
        if not isinstance(store, CompressedStore) or not (store.waits and own and same):
            raise ValueError(
                f"reconstruct: {list(ids.shape)} ids for a cache of {list(self.valid.shape)}; give the whole cached "
                "text, without padding, and a CompressedStore of scorer='kvzip:budget=...' for a model without windows"
            )
        self._listens = True
        try:
            for repeated in repetitions(ids, ask, chunk):
                with torch.no_grad():
                    model(repeated, past_key_values=self, use_cache=True)
        finally:
            self._listens = False
        store.choose(self.seqs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the history it chose; pages are shared, not copied."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each request; the copies share their pages."""
        self._select(torch.arange(len(self.seqs)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some requests."""
        self._select(indices)

    def _select(self, indices: Tensor) -> None:
        order = indices.tolist()
        if self.seqs:
            self.seqs = self.store.reorder(self.seqs, order)
            self.valid = self.valid[order]
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns (rejected speculation); ``tokens_to_remove`` is negative or zero."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}"
            )
        self.valid = self.valid[:, : self.columns + tokens_to_remove]
        for seq, length in zip(self.seqs, self.lengths, strict=True):
            self.store.truncate(seq, self.state.rule.local_length(length))
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.release()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                layer.reset()

    def release(self) -> None:
        """Give the pages back to the store."""
        if self.write_step is not None:
            self.store.abort(self.write_step)
            self.write_step = None
        self.store.close(self.seqs)
        self.seqs = []
        self.valid = np.zeros((0, 0), dtype=bool)

    def __del__(self) -> None:
        # A cache that goes out of scope must not keep its pages: the store outlives it.
        if getattr(self, "seqs", None):
            self.release()


def refuse_cache(cache: Any) -> None:
    """Explain that another cache cannot hold a sequence that is cut over ranks."""
    raise PlanError(
        f"past_key_values of type {type(cache).__name__}",
        "cannot hold keys and values cut over kvp ranks",
        "leave it out (a PagedCache is made), or pass the PagedCache an earlier forward returned",
    )
