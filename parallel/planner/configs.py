"""Published configs by name, with their sources: what `plait plan` and `plait explain` know without a download.

Only the fields that shapes need; what else a config says (rotary bases, norms) changes no byte.
"""

from __future__ import annotations

from typing import Any

from .published import PUBLISHED

HUB = "config.json of huggingface.co/"


def _llama(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen3(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int = 8, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _mixtral(hidden: int, ffn: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": vocab,
        "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": layers,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2), "attention_bias": True,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _moe(experts: int, per_token: int, width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
    }  # fmt: skip


_R1: dict[str, Any] = {**PUBLISHED["deepseek-r1"], "topk_method": "noaux_tc"}
_K2: dict[str, Any] = {
    **_R1, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
    "first_k_dense_replace": 1, "vocab_size": 163840,
}  # fmt: skip
_MINIMAX_M2: dict[str, Any] = {
    "model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 200064,
    "num_local_experts": 256, "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip
_STEP3: dict[str, Any] = {
    "model_type": "step3_text", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 256, "share_q_dim": 2048,
    "vocab_size": 128815, "num_experts": 48, "num_experts_per_tok": 3, "moe_intermediate_size": 5120,
    "shared_expert_intermediate_size": 5120, "moe_layers": list(range(4, 60)), "tie_word_embeddings": False,
}  # fmt: skip
_QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "num_experts": 512,
    "num_experts_per_tok": 10, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_num_value_heads": 64, "linear_value_head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip

# name -> (fields, source)
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "llama-8b": (_llama(4096, 14336, 32, 32), f"{HUB}meta-llama/Llama-3.1-8B"),
    "llama-70b": (_llama(8192, 28672, 80, 64), f"{HUB}meta-llama/Llama-3.1-70B"),
    "llama-405b": (PUBLISHED["llama-405b"], f"{HUB}meta-llama/Llama-3.1-405B"),
    "qwen3-8b": (_qwen3(4096, 12288, 36, 32), f"{HUB}Qwen/Qwen3-8B"),
    "qwen3-32b": (_qwen3(5120, 25600, 64, 64), f"{HUB}Qwen/Qwen3-32B"),
    "qwen3-30b-a3b": (_qwen3(2048, 6144, 48, 32, 4, **_moe(128, 8, 768)), f"{HUB}Qwen/Qwen3-30B-A3B"),
    "qwen3-235b-a22b": (_qwen3(4096, 12288, 94, 64, 4, **_moe(128, 8, 1536)), f"{HUB}Qwen/Qwen3-235B-A22B"),
    "qwen3.5-397b-a17b": (_QWEN35, f"{HUB}Qwen/Qwen3.5-397B-A17B"),
    "mixtral-8x7b": (_mixtral(4096, 14336, 32, 32, 32000), f"{HUB}mistralai/Mixtral-8x7B-v0.1"),
    "mixtral-8x22b": (_mixtral(6144, 16384, 56, 48, 32768), f"{HUB}mistralai/Mixtral-8x22B-v0.1"),
    "deepseek-r1": (_R1, f"{HUB}deepseek-ai/DeepSeek-R1"),
    "kimi-k2": (_K2, f"{HUB}moonshotai/Kimi-K2-Instruct"),
    "minimax-m2.5": (_MINIMAX_M2, f"{HUB}MiniMaxAI/MiniMax-M2.5"),
    "gpt-oss-20b": (_gpt_oss(24, 32), f"{HUB}openai/gpt-oss-20b"),
    "gpt-oss-120b": (_gpt_oss(36, 128), f"{HUB}openai/gpt-oss-120b"),
    "step-3": (_STEP3, f"{HUB}stepfun-ai/step3, text part"),
}  # fmt: skip
