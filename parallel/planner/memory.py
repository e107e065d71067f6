"""Memory of one rank in inference: weights and KV, for columns of candidates."""

from __future__ import annotations

from typing import Any

import numpy as np

from .attention_cost import kv_bytes_on_rank
from .candidates import Candidates
from .columns import Array, as_array
from .shapes import Attention, Decoder, Ffn

HEAD_BYTES = 2.0  # embedding and head stay in 16 bits in every published recipe


def cut_qkv(attention: Attention) -> tuple[float, float, float]:
    """Return weights before attention: (on every rank, cut over tp, cut over all kvp * tp ranks after it).

    MLA's down-projections are on every rank, its W_UK goes with the query heads and its W_UV, like the output
    projection, with the heads a rank keeps after the exchange.
    """
    if attention.mixer:
        return 0.0, float(attention.mixer), 0.0
    wide = attention.heads * attention.head_dim
    if attention.kv_rank is None:
        whole = attention.hidden * attention.q_rank if attention.q_rank else 0
        return (
            float(whole),
            float(attention.q_params - whole + attention.kv_params),
            float(attention.o_params),
        )
    down = attention.kv_params + (attention.hidden * attention.q_rank if attention.q_rank else 0)
    up_q = (attention.q_rank or attention.hidden) * wide
    to_latent = attention.kv_rank * attention.heads * (attention.head_dim - attention.rope_dim)
    return (
        float(down),
        float(up_q + to_latent),
        float(attention.up_params - to_latent + attention.o_params),
    )


def attention_weights(attention: Attention, c: Candidates) -> Array:
    """Return elements of one layer's attention on a rank; KV heads beyond tp = K are copies."""
    whole, by_tp, by_all = cut_qkv(attention)
    if attention.mixer or attention.is_mla:
        return whole + by_tp / c.tp + by_all / c.ffn_tp
    copies = np.ceil(attention.kv_heads / c.tp) * c.tp / attention.kv_heads
    kv = attention.kv_params * copies / c.tp
    return whole + (by_tp - attention.kv_params) / c.tp + kv + by_all / c.ffn_tp


def ffn_weights(ffn: Ffn, c: Candidates) -> Array:
    """Return elements of one layer's feed-forward on a rank."""
    if not ffn.experts:
        return ffn.expert_params / c.ffn_tp
    routed = ffn.experts * ffn.expert_params / (c.ep * c.etp)
    return routed + ffn.shared_params / c.ffn_tp + ffn.router_params


def weight_bytes(model: Decoder, c: Candidates, element: float) -> Array:
    """Return the weights on the fullest rank."""
    layers = sum(
        kind.count * (attention_weights(kind.attention, c) + ffn_weights(kind.ffn, c))
        for kind in model.kinds
    )
    share = np.ceil(model.layers / c.pp) / model.layers
    return layers * share * element + model.embedding_params * HEAD_BYTES / c.ffn_tp / np.minimum(
        c.pp, 2
    )


def request_bytes(model: Decoder, c: Candidates, tokens: Any, element: float) -> Array:
    """Return one request's KV on the fullest rank."""
    share = np.ceil(model.layers / c.pp) / model.layers
    held = sum(
        kind.count * kv_bytes_on_rank(kind.attention, tokens, element, c.tp, c.sequence)
        for kind in model.kinds
    )
    return share * as_array(held)


def rank_bytes(
    model: Decoder,
    c: Candidates,
    tokens: Any,
    weight: float,
    kv: float,
    floor: float,
    activation: float = 2.0,
) -> Array:
    """Return all bytes of a rank: weights, KV of the batches in flight, activations of a step, and the floor."""
    held = weight_bytes(model, c, weight) + request_bytes(model, c, tokens, kv) * c.batch * c.pp
    widest = max(model.hidden, max(k.ffn.width for k in model.kinds))
    return held + floor + c.rows * (4 * model.hidden + 2 * widest) * activation
