"""Texts fed to compressed stores, whose keys, values and queries depend on the ids alone."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from functools import cache

import torch
from torch import Tensor

from plait.kvstore import CompressedStore, KVSpec

IDS, HEADS = 64, 4


@cache
def id_table(spec: KVSpec) -> Tensor:
    """Shape: -> `[3, layers, IDS, HEADS, head_dim]`: of each id its keys, values (of the first heads) and queries."""
    gen = torch.Generator().manual_seed(9)
    return torch.randn(3, spec.layers, IDS, HEADS, spec.head_dim, generator=gen).to(spec.dtype)


def fed(
    store: CompressedStore, seq, ids: Listing[int] | Tensor, sizes: Listing[int]
) -> list[Tensor]:
    """Feed what follows in ids in steps of these sizes; give what each layer of each step attended to."""
    spec, outs, start = store.spec, [], seq.tokens
    for size in sizes:
        rest = torch.as_tensor(ids[start : start + size])
        k, v, q = (x[:, rest] for x in id_table(spec))
        step = store.reserve([seq], [size])
        for layer in range(spec.layers):
            store.append(step, layer, k[layer, :, : spec.kv_heads], v[layer, :, : spec.kv_heads])
            outs.append(store.attend(seq, layer, q[layer], step=step)[0])
        store.commit(step)
        start += size
    return outs
