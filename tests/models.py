"""Tiny transformers models of every family, in float64 throughout, with weights that hide nothing."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "head_dim": 8,
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: (config class, model class, what differs from SIZES; None removes)
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"hidden_size": 64, "head_dim": None}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"hidden_size": 64, "pad_token_id": 0, "head_dim": None},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {"hidden_size": 64, "rotary_pct": 0.5, "num_key_value_heads": None, "head_dim": None},
    ),
    "deepseek": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": None,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "intermediate_size": 36},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 18},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 0,
        },
    ),
    # an activation that learns two numbers
    "apertus": ("ApertusConfig", "ApertusForCausalLM", {}),
    # what the model does outside its layers: it multiplies embeddings it is given too,
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.4,
        },
    ),
    # and normalises without a parameter
    "olmo": (
        "OlmoConfig",
        "OlmoForCausalLM",
        {"clip_qkv": 0.5, "hidden_size": 64, "head_dim": None},
    ),
}


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Make a tiny model in eval mode; ``changes`` go to its config (``heads``, ``kv_heads`` in short)."""
    import transformers

    transformers.logging.set_verbosity_error()
    config_name, model_name, differs = FAMILIES[family]
    short = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "layers": "num_hidden_layers",
             "hidden": "hidden_size", "ffn": "intermediate_size", "vocab": "vocab_size"}  # fmt: skip
    values = {**SIZES, **differs, **{short.get(k, k): v for k, v in changes.items()}}
    config = getattr(transformers, config_name)(
        **{k: v for k, v in values.items() if v is not None}
    )
    config._experts_implementation = "eager"  # the grouped one has no float64
    model = getattr(transformers, model_name)(config).to(dtype).eval()
    fill(model, seed)
    return keep_float64(model) if dtype == torch.float64 else model


def fill(model: nn.Module, seed: int) -> None:
    """Draw every parameter (biases, norms and sinks too) from a generator of its own name, alike on every rank."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(drawn * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # zero by default, which hides it
                drawn = torch.rand(
                    buffer.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
                buffer.copy_(drawn * 0.3)


class StayFloat64(TorchFunctionMode):
    """Turn conversions of float64 tensors to float32 into nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def keep_float64(model: Any) -> Any:
    """Let norms, routers and rotary embeddings compute in float64.

    transformers computes them in float32 whatever the model's dtype: two float64 runs that differ by 1e-16 then differ
    by 1e-7 whenever a value falls on either side of a float32. The reference and the parallel model are treated alike.
    """
    for module in model.modules():
        kind: Any = type(module)
        if any(word in kind.__name__ for word in ("RMSNorm", "OlmoLayerNorm", "Router", "Rotary")):
            module.__class__ = type(kind.__name__, (kind,), {"forward": _in_float64(kind.forward)})
    return model


def _in_float64(forward: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with StayFloat64():
            return forward(self, *args, **kwargs)

    return wrapped


def tokens(batch: int, length: int, vocab: int = 61, seed: int = 1) -> Tensor:
    """Draw token ids, never 0 (which tests use for padding)."""
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
