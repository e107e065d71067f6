"""Attention: bytes and FLOPs of the cache, the scores and the projections, in decode and prefill.

All functions take numbers or arrays and speak of one layer. `tokens` are those in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .columns import Array, as_array
from .shapes import Attention, Decoder

STATE_BYTES = 4.0  # a linear layer's state is kept in fp32


def seen(attention: Attention, tokens: Any) -> Array:
    """Return how many cached tokens a query sees: all, or a window of them."""
    count = as_array(tokens)
    return count if attention.window is None else np.minimum(count, attention.window)


def kv_bytes(attention: Attention, tokens: Any, element: float) -> Array:
    """Return the bytes one request keeps: ``2 K d S b``, ``(c + r) S b`` in MLA, or a fixed state."""
    if attention.state:
        return as_array(attention.state * STATE_BYTES) + 0 * as_array(tokens)
    return attention.kv_elements * seen(attention, tokens) * element


def kv_bytes_on_rank(attention: Attention, tokens: Any, element: float, tp: Any, kvp: Any) -> Array:
    """Return one rank's share: ``2 ceil(K/tp) d ceil(S/kvp) b``. Beyond tp = K the heads are copies.

    Window layers and linear states keep what they have on every kvp rank: it is short.
    Source: Helix (arXiv 2507.07120) appendix A.
    """
    tp, kvp = as_array(tp), as_array(kvp)
    if attention.state:
        return kv_bytes(attention, tokens, element) / tp
    heads = np.ceil(attention.cache_heads / tp)
    if attention.window is not None:
        return heads * attention.cache_width * seen(attention, tokens) * element
    return heads * attention.cache_width * np.ceil(as_array(tokens) / kvp) * element


def decode_flops(attention: Attention, tokens: Any) -> Array:
    """Return score and value FLOPs of one query token: ``2 Q (d_k + d_v) S``; MLA ``2 Q (2c + r) S``.

    MLA is absorbed: scores over ``c + r``, values over ``c``.
    """
    if attention.state:
        return as_array(4.0 * attention.state) + 0 * as_array(tokens)
    width = attention.head_dim + attention.value_head_dim
    if attention.kv_rank is not None:
        width = 2 * attention.kv_rank + attention.rope_dim
    return 2.0 * attention.heads * width * seen(attention, tokens)


def decode_flops_rounded(attention: Attention, tokens: Any) -> Array:
    """Return decode FLOPs as Step-3 (arXiv 2507.19427) counts MLA: ``4 Q (c + r) S``, 6 % more."""
    if attention.kv_rank is None:
        return decode_flops(attention, tokens)
    return 4.0 * attention.heads * attention.cache_width * seen(attention, tokens)


def prefill_pairs(attention: Attention, new: Any, past: Any = 0) -> Array:
    """Return how many (query, key) pairs a causal prefill of `new` tokens after `past` computes."""
    new, past = as_array(new), as_array(past)
    pairs = new * past + new * (new + 1) / 2
    if attention.window is None:
        return pairs
    window = float(attention.window)
    full = np.minimum(pairs, new * window)  # exact where past >= window; else the ramp is counted
    ramp = np.clip(window - past, 0, new)  # queries that do not yet see a whole window
    inside = ramp * past + ramp * (ramp + 1) / 2 + (new - ramp) * window
    return np.minimum(full, inside)


def prefill_flops(attention: Attention, new: Any, past: Any = 0) -> Array:
    """Return score and value FLOPs of a prefill; MLA is not absorbed there: ``2 Q (d_k + d_v)`` a pair."""
    if attention.state:
        return 4.0 * attention.state * as_array(new)
    width = attention.head_dim + attention.value_head_dim
    return 2.0 * attention.heads * width * prefill_pairs(attention, new, past)


def intensity(attention: Attention, element: float, rounded: bool = False) -> float:
    """Return decode FLOPs per cached byte: independent of batch and context."""
    flops = decode_flops_rounded if rounded else decode_flops
    return float(flops(attention, 1.0) / kv_bytes(attention, 1.0, element))


@dataclass(frozen=True, slots=True)
class Absorption:
    """One operator of MLA, with W_UK absorbed into the query or not."""

    operator: str
    phase: str
    absorbed: bool
    flops: float
    intensity: float


def absorption_table(attention: Attention, batch: int, tokens: int) -> tuple[Absorption, ...]:
    """Return the eight rows of arXiv 2507.15465 table III: FLOPs and FLOP per element.

    Absorbing multiplies score work by ``c / d`` and cuts the decode traffic by ``Q d / c``.
    """
    if attention.kv_rank is None:
        raise ValueError("absorption is MLA's")
    c, q, d = attention.kv_rank, attention.heads, attention.head_dim - attention.rope_dim
    decompress = 2.0 * batch * tokens * c * q * d
    square, line = 2.0 * batch * q * tokens**2, 2.0 * batch * q * tokens
    rows = (
        ("decompress", "prefill", False, decompress, c),
        ("decompress", "prefill", True, decompress, 1 / (1 / d + 1 / c)),
        ("score", "prefill", False, square * d, d),
        ("score", "prefill", True, square * c, c),
        ("decompress", "decode", False, decompress, c),
        ("decompress", "decode", True, 2.0 * batch * c * q * d, d),
        ("score", "decode", False, line * d, 1),
        ("score", "decode", True, line * c, 1 / (1 / q + 1 / c)),
    )
    return tuple(Absorption(op, phase, on, flops, float(x)) for op, phase, on, flops, x in rows)


@dataclass(frozen=True, slots=True)
class PerToken:
    """What one decoded token costs in the whole model (Step-3 table 2)."""

    kv_bytes: float
    attention_flops: float
    linear_flops: float
    ffn_flops: float


def per_token(model: Decoder, tokens: int, element: float, rounded: bool = False) -> PerToken:
    """Return bytes and FLOPs of one decoded token over all layers, head and router left out."""
    flops = decode_flops_rounded if rounded else decode_flops
    return PerToken(
        float(sum(k.count * kv_bytes(k.attention, tokens, element) for k in model.kinds)),
        float(sum(k.count * flops(k.attention, tokens) for k in model.kinds)),
        2.0 * sum(k.count * k.attention.matrix_params for k in model.kinds),
        2.0 * sum(k.count * k.ffn.active_params for k in model.kinds),
    )
