"""Attention modules by the names of their projections: the thin word of a family where the tables are silent."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..attention.mla import Mla
from ..attention.role import Attention
from ..shape import ModelShape

_COUNTS = (
    ("num_key_value_groups", "groups"),
    ("num_key_value_heads", "kv_heads"),
    ("num_heads", "heads"),
    ("num_attention_heads", "heads"),
)
_OUTPUTS = ("o_proj", "dense", "out_proj")
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def role_of(
    module: nn.Module, shape: ModelShape, layer: int, helix: bool
) -> Attention | Mla | None:
    """Recognise an attention module; None if it is something else."""
    names = dict(module.named_children())
    output = next((name for name in _OUTPUTS if isinstance(names.get(name), nn.Linear)), None)
    if output is None:
        return None
    if "kv_a_proj_with_mqa" in names:
        return _latent(module, names, output)
    window = bool(shape.window_layers and shape.window_layers[layer])
    if shape.heads is None or shape.kv_heads is None:
        return None
    head_dim = (
        getattr(module, "head_dim", None) or getattr(module, "head_size", None) or shape.head_dim
    )
    if head_dim is None:
        return None
    role = Attention(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=int(head_dim),
        o=output,
        norms=tuple(
            name for name in _NORMS if name in names and any(True for _ in names[name].parameters())
        ),
        sinks="sinks" if "sinks" in module._parameters else None,
        counts=_COUNTS,
        window=window,
        through="transformers",
    )
    return _with_inputs(role, names)


def _with_inputs(role: Attention, names: dict[str, nn.Module]) -> Attention | None:
    if {"q_proj", "k_proj", "v_proj"} <= names.keys():
        return replace(role, q="q_proj", k="k_proj", v="v_proj")
    if "qkv_proj" in names:  # Phi-3 reads the head count from its config to find where k begins
        return replace(role, fused="qkv_proj", config_counts=(("num_attention_heads", "heads"),))
    if "query_key_value" in names and role.heads == role.kv_heads:
        return replace(role, fused="query_key_value", fused_order="per_head")
    return None


def _latent(module: nn.Module, names: dict[str, nn.Module], output: str) -> Mla:
    low_rank = "q_b_proj" in names and isinstance(names["q_b_proj"], nn.Linear)
    shared = [n for n in ("q_a_proj", "q_a_layernorm") if low_rank]
    return Mla(
        heads=module.num_heads,  # type: ignore[arg-type]
        nope_dim=module.qk_nope_head_dim,  # type: ignore[arg-type]
        rope_dim=module.qk_rope_head_dim,  # type: ignore[arg-type]
        value_dim=module.v_head_dim,  # type: ignore[arg-type]
        latent_dim=module.kv_lora_rank,  # type: ignore[arg-type]
        q="q_b_proj" if low_rank else "q_proj",
        shared=(*shared, "kv_a_proj_with_mqa", "kv_a_layernorm"),
        o=output,
    )
