"""Helix as its paper models it: the roofline of appendix A, and HOP-B's two-stage pipeline.

Source: Helix Parallelism (arXiv 2507.07120). Figure 1 follows the appendix, which puts the Q *and* the output
projection at tp; planning (`step_time`) cuts the output projection over all kvp * tp ranks, as section 2.2 does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .columns import Array, as_array


def kv_read_seconds(
    batch: Any,
    kv_heads: int,
    head_dim: int,
    tokens: Any,
    tp: Any,
    kvp: Any,
    element: float,
    bandwidth: float,
) -> Array:
    """Return ``B 2 ceil(K/TPA) D (S/KVP) b / BW`` of one layer. Flat from tp = K on."""
    heads = np.ceil(kv_heads / as_array(tp))
    return (
        as_array(batch)
        * 2
        * heads
        * head_dim
        * as_array(tokens)
        / as_array(kvp)
        * element
        / bandwidth
    )


def weight_read_seconds(
    hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, tp: Any, ffn_tp: Any, element: float,
    bandwidth: float,
) -> Array:  # fmt: skip
    """Return ``(2 H (Q/TPA) D + 2 H ceil(K/TPA) D + 3 H F / TPF) b / BW`` of one layer."""
    tp = as_array(tp)
    projections = (
        2 * hidden * (heads / tp) * head_dim + 2 * hidden * np.ceil(kv_heads / tp) * head_dim
    )
    return (projections + 3 * hidden * ffn / as_array(ffn_tp)) * element / bandwidth


def crossover_tokens(
    batch: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    tp: int,
    ffn_tp: int,
) -> float:
    """Return the context at which reading KV takes as long as reading weights."""
    weights = weight_read_seconds(hidden, heads, kv_heads, head_dim, ffn, tp, ffn_tp, 1.0, 1.0)
    one_token = kv_read_seconds(batch, kv_heads, head_dim, 1, tp, 1, 1.0, 1.0)
    return float(weights / one_token)


def overlapped(compute: Any, communication: Any, chunks: Any) -> Array:
    """Return HOP-B's time: ``c + m + (n-1) max(c, m)`` for n chunks of c compute and m communication.

    One chunk is no overlap: ``c + m``.
    """
    c, m = as_array(compute), as_array(communication)
    return c + m + (as_array(chunks) - 1) * np.maximum(c, m)


def chunked_exchange(
    attention: Any, sent_bytes: Any, latency: Any, bandwidth: Any, chunks: Any
) -> Array:
    """Return attention and its exchange in n chunks where every launch costs a latency.

    Chunking pays only when messages are bound by bandwidth: each further chunk adds one latency, and hides at most
    ``bytes / bandwidth``.
    """
    n = as_array(chunks)
    exchange = as_array(latency) + as_array(sent_bytes) / as_array(bandwidth) / n
    return overlapped(as_array(attention) / n, exchange, n)
