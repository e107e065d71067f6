"""Tensor parallelism is exact: logits, gradients, cached steps, generation and undo, in float64."""

from __future__ import annotations

import pytest

from exactness import Case, Table, assert_exact, case

CASES = [
    case("tp2", "llama"),
    case("tp2", "qwen2"),
    case("tp2", "qwen3"),
    case("tp2", "mistral"),
    case("tp2", "gemma3"),
    case("tp2", "phi3"),
    case("tp2", "gpt_neox"),
    case("tp2", "deepseek"),
    case("tp2", "mixtral"),
    case("tp2 etp2", "mixtral"),
    case("tp2 etp2", "deepseek"),
    case("tp2", "gpt_oss"),
    case("tp2", "apertus"),
    case("tp2:sp", "apertus"),
    case("tp2:sp", "llama"),
    case("tp2:sp", "qwen3"),
    case("tp2:sp", "gemma3"),
    case("tp2:sp", "phi3"),
    case("tp3", "llama", heads=6, kv_heads=3),
    case("tp3", "qwen3", heads=6, kv_heads=3),
    case("tp3", "phi3", heads=6, kv_heads=3, hidden=60),
    case("tp3", "gpt_neox", heads=6, hidden=60),
    case("tp3:sp", "llama", heads=6, kv_heads=3),
    case("tp4", "llama"),
    case("tp4", "gemma3"),
    case("tp4", "gpt_oss"),
    case("tp4 etp4", "mixtral"),
    case("tp4", "deepseek"),
    case("tp5", "llama", heads=5, kv_heads=5, hidden=40, vocab=11, ffn=6),
    case("tp8,replicate_kv=true", "llama"),
    case("tp8,replicate_kv=true", "qwen3"),
    case("tp8,replicate_kv=true", "phi3"),
    case("tp8:sp,replicate_kv=true", "qwen2"),
    case("tp4,replicate_kv=true", "gpt_oss", kv_heads=2),
]
TABLE = Table(CASES)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_tensor_parallel_is_exact(each: Case) -> None:
    assert_exact(TABLE.errors(each))
