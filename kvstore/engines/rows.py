"""Caches of transformers whose rows are sequences of a store: what all of them do alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowCache(Cache, ABC):
    """A transformers cache of which each row is a sequence of a store. Close it, or use `with`.

    Args:
        store: a `KVStore` or a `CompressedStore`.

    State: `seqs`, a sequence for each row, until it is closed; the open step is the subclass's.
    """

    store: Any
    seqs: list[Any]

    def __init__(self, store: Any) -> None:
        super().__init__(layers=[StoredLayer(self, layer) for layer in range(store.spec.layers)])
        self.store = store

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Columns of each row so far, the last forward's included once all its layers ran."""

    @abstractmethod
    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take one layer's new tokens, `[batch, kv_heads, new, d]`; give what attention shall be given."""

    @abstractmethod
    def commit(self) -> None:
        """Commit the last forward, or drop it if it did not come to its end."""

    def close(self) -> None:
        """End the sequences: their pages are free, or stay cached where the store keeps prefixes."""
        self.commit()
        self.store.close(self.seqs)
        self.seqs = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "seqs", None):  # a cache that goes out of scope keeps no pages
            self.close()

    def _select(self, rows: list[int]) -> None:
        self.commit()
        self.seqs = self.store.reorder(self.seqs, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the tokens it chose; pages are shared."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; the copies share their pages."""
        self._select(torch.arange(len(self.seqs)).repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(indices.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each row; the number is negative or zero."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}"
            )
        self.commit()
        for seq in self.seqs:
            self.store.truncate(seq, self._left(seq.length, tokens_to_remove))

    def _left(self, length: int, change: int) -> int:
        """Tokens a row of this length has left after a crop."""
        return length + change


class StoredLayer(CacheLayerMixin):
    """One attention layer of a `RowCache`."""

    is_sliding = False  # windows are the mask's: all tokens are kept
    is_croppable = True

    def __init__(self, cache: RowCache, number: int) -> None:
        super().__init__()
        self.cache = cache
        self.number = number
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store was there first."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens and give all: [batch, kv_heads, new, d] -> [batch, kv_heads, all, d]."""
        return self.cache.write(self.number, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens."""
        return self.cache.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of each row so far."""
        return self.cache.tokens

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
