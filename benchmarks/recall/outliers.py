"""Outliers put into a model's keys without changing what it computes: what separates codecs as real models do."""

from __future__ import annotations

import torch
from model import Recall


@torch.no_grad()
def inject(model: Recall, factor: float, pairs: int, seed: int = 0) -> None:
    """Scale some rotary pairs of each KV head's keys by a factor, and of its queries by the inverse, in place.

    Rotation turns a pair as one, so the scale passes through it and every dot product is what it was.
    """
    rng = torch.Generator().manual_seed(seed)
    config = model.llama.config
    width, kv_heads = config.head_dim, config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    for layer in model.llama.model.layers:
        for head in range(kv_heads):
            chosen = torch.randperm(width // 2, generator=rng)[:pairs]
            channels = torch.cat([chosen, chosen + width // 2])
            layer.self_attn.k_proj.weight[head * width + channels] *= factor
            for member in range(head * group, (head + 1) * group):
                layer.self_attn.q_proj.weight[member * width + channels] /= factor
