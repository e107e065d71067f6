"""ModelShape: the numbers of a model that legality, KV layout and the planner need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The shape of a decoder. None means unknown, and no rule that needs it is applied.

    `head_dim` is the width of q and k per head, `value_head_dim` that of v; they differ in MLA.
    `kv_heads` of an MLA model is its number of heads: what it caches is one latent of
    ``kv_lora_rank + qk_rope_head_dim`` per token. `shared_ffn` is the width of all shared experts
    together; `moe_ffn` that of one routed expert. `window_layers` and `expert_layers` have one
    entry per layer, or are empty (no such layer).
    """

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    experts: int | None = 0
    experts_per_token: int = 0
    moe_ffn: int = 0
    shared_experts: int = 0
    shared_ffn: int = 0
    expert_layers: tuple[bool, ...] = ()
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    attention: str = "gqa"
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    tied: bool = False
    sinks: bool = False

    @property
    def cache_heads(self) -> int | None:
        """KV heads as cached: 1 for MLA (the latent), else kv_heads."""
        return 1 if self.attention == "mla" else self.kv_heads

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a transformers config (or anything with its attribute names) by duck typing.

        A composite (multimodal) config is read through its ``get_text_config``.
        """
        if callable(getattr(config, "get_text_config", None)):
            config = config.get_text_config()
        elif hasattr(config, "text_config"):
            config = config.text_config
        layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        heads = _first(config, "num_attention_heads", "n_head", "num_heads")
        window, window_layers = _windows(config, layers)
        ffn = _first(config, "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
        if ffn is None and hidden is not None and hasattr(config, "n_inner"):
            ffn = 4 * hidden  # GPT-2: n_inner=None
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=_kv_heads(config, heads),
            ffn=ffn,
            vocab=_first(config, "vocab_size"),
            window=window,
            window_layers=window_layers,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            sinks=getattr(config, "model_type", "") == "gpt_oss",
            **_head_dims(config, hidden, heads),
            **_experts(config, layers, ffn),
        )


def _first(config: Any, *names: str) -> Any:
    """Return the first of these attributes that is there and not None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _kv_heads(config: Any, heads: int | None) -> int | None:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1  # Falcon: num_kv_heads is set but unused in this mode
    return _first(config, "num_key_value_heads", "num_kv_heads") or heads


def _head_dims(config: Any, hidden: int | None, heads: int | None) -> dict[str, Any]:
    rank = _first(config, "kv_lora_rank")
    if rank is not None:  # MLA: config.head_dim is only the rotary part there
        rope = _first(config, "qk_rope_head_dim")
        return {
            "attention": "mla",
            "head_dim": (_first(config, "qk_nope_head_dim") or 0) + (rope or 0),
            "value_head_dim": _first(config, "v_head_dim"),
            "kv_lora_rank": rank,
            "q_lora_rank": _first(config, "q_lora_rank"),
            "qk_rope_head_dim": rope,
        }
    head_dim = _first(config, "head_dim")
    if head_dim is None and hidden is not None and heads:
        head_dim = hidden // heads
    return {"head_dim": head_dim, "value_head_dim": _first(config, "v_head_dim") or head_dim}


def _windows(config: Any, layers: int | None) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window and, per layer, whether it sees only a window (or chunk) of the past."""
    window, kinds = _first(config, "sliding_window"), _first(config, "layer_types")
    if kinds is not None:
        local = tuple(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
        if "chunked_attention" in kinds:
            window = _first(config, "attention_chunk_size")
        return (window, local) if any(local) else (None, ())
    # Qwen2's older configs carry a window that use_sliding_window=False switches off
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None, ()
    return window, (True,) * (layers or 0)


def _experts(config: Any, layers: int | None, ffn: int | None) -> dict[str, Any]:
    experts = _first(config, "n_routed_experts", "num_local_experts", "num_experts") or 0
    if not experts:
        return {}
    moe_ffn = _first(config, "moe_intermediate_size") or ffn or 0
    shared = _first(config, "n_shared_experts") or 0
    shared_ffn = _first(config, "shared_expert_intermediate_size") or shared * moe_ffn
    return {
        "experts": experts,
        "experts_per_token": _first(config, "num_experts_per_tok", "num_experts_per_token") or 0,
        "moe_ffn": moe_ffn,
        "shared_experts": shared or int(shared_ffn > 0),
        "shared_ffn": shared_ffn,
        "expert_layers": _expert_layers(config, layers or 0),
    }


def _expert_layers(config: Any, layers: int) -> tuple[bool, ...]:
    listed = _first(config, "moe_layers")
    if listed is not None:
        return tuple(layer in listed for layer in range(layers))
    dense_first = _first(config, "first_k_dense_replace") or 0
    step = _first(config, "decoder_sparse_step", "moe_layer_freq") or 1
    dense = _first(config, "mlp_only_layers") or ()
    return tuple(
        layer >= dense_first and (layer + 1) % step == 0 and layer not in dense
        for layer in range(layers)
    )
