"""Experts over ranks are exact: values, gradients, cached steps, generation and undo, in float64."""

from __future__ import annotations

import pytest

from exactness import Case, Table, assert_exact, case

GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
TRAIN = ("train",)
CASES = [
    case("tp2 ep2", "mixtral"),
    case("tp2 ep2,exchange=tokens", "gpt_oss"),
    case("tp2 ep2,exchange=tokens", "deepseek", TRAIN, **GROUPED),
    case("tp2 ep2", "qwen2_moe", TRAIN),
    case("tp2 etp2", "gpt_oss", ("train", "undo")),
    case("kvp2,interleave=2 ep2", "qwen3_moe", TRAIN),
    case("tp4 ep2", "mixtral", TRAIN),
    case("tp4 ep2,exchange=tokens", "qwen2_moe", TRAIN),
    case("tp4 ep2,exchange=tokens etp2", "gpt_oss", TRAIN),
    case("tp4 etp2", "gpt_oss", TRAIN),
    case("kvp2,interleave=2 tp2 ep2 etp2", "qwen3_moe", ("train", "generate", "undo")),
    case("kvp2,interleave=2 tp2 ep4,exchange=tokens", "mixtral", ("train", "generate")),
    case("kvp4,interleave=2 ep2,exchange=tokens etp2", "deepseek", TRAIN),
    case("tp3 etp3", "mixtral", TRAIN, heads=6, kv_heads=3, ffn=7),
    case("tp3 ep3,exchange=tokens", "mixtral", TRAIN, heads=6, kv_heads=3, num_local_experts=6),
    case("kvp4,interleave=2 tp2 ep4 etp2", "mixtral", ("train", "generate")),
]
TABLE = Table(CASES)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_experts_are_exact(each: Case) -> None:
    assert_exact(TABLE.errors(each))
