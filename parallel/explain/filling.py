"""Caches that hold a context nobody computed: meta tensors of the right shape, through the caches' own methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def empty_cache(twin: Any, batch: int, tokens: int) -> Any:
    """Make the cache that a forward would make; under Helix with pages for ``tokens`` more tokens."""
    if not hasattr(twin, "kv_cache"):
        from transformers import DynamicCache

        return DynamicCache(config=twin.config)
    cache = twin.kv_cache()
    spec = cache.store.spec
    # The store grows by copying when it must; here it has its size from the start, as a server's would.
    pages = batch * -(-local_tokens(cache, tokens) // spec.page_tokens)
    cache.store.grow(max(pages + cache.store.pool.capacity - cache.store.pool.free_pages, 1))
    return cache


Shapes = list[tuple[torch.Size, ...] | None]


def shapes_of_one_token(twin: Any) -> Shapes:
    """Find what each layer's cache gets of one token of one request; None for layers that write to the store."""
    cache = empty_cache(twin, 1, 1)
    if hasattr(cache, "store") and all(hasattr(layer, "layer") for layer in cache.layers):
        return [None] * len(cache.layers)  # all of it goes to the store
    twin(torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    return [
        None if layer.keys is None else (layer.keys.shape, layer.values.shape)
        for layer in cache.layers
    ]


def fill(twin: Any, shapes: Shapes, batch: int, context: int, room: int = 0) -> Any:
    """Make a cache in which each of ``batch`` requests has ``context`` tokens, and pages for ``room`` more.

    What a layer keeps of ``context`` tokens is decided by the cache's own layers: windows stay short, Helix layers keep
    this rank's tokens in pages of the store.
    """
    cache = empty_cache(twin, batch, context + room)
    dtype = next(p for p in twin.parameters() if p.is_floating_point()).dtype
    for layer, pair in zip(cache.layers, shapes, strict=True):
        if pair is not None:
            sizes = [(batch, heads, context, width) for _, heads, _, width in pair]
            layer.update(*(torch.empty(size, dtype=dtype, device="meta") for size in sizes))
    if hasattr(cache, "store"):
        _fill_store(cache, batch, context)
    return cache


def _fill_store(cache: Any, batch: int, context: int) -> None:
    store, spec = cache.store, cache.store.spec
    cache.seqs = store.open_batch(batch)
    cache.valid = np.ones((batch, context), dtype=bool)
    tokens = local_tokens(cache, context)
    step = store.reserve(cache.seqs, tokens)
    for layer in range(spec.layers):
        rows = [
            torch.empty(batch * tokens, spec.kv_heads, width, dtype=spec.dtype, device=spec.device)
            for width in spec.widths
        ]
        store.append(step, layer, *rows)
    store.commit(step)


def local_tokens(cache: Any, context: int) -> int:
    """Tokens of a request that this rank keeps."""
    return cache.state.rule.local_length(context)


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds on this rank."""
    if cache is None:
        return 0
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    whole = sum(t.numel() * t.element_size() for t in kept if t is not None)
    return whole + (cache.kv_bytes if hasattr(cache, "store") else 0)
