"""Experts on host or disk: bitwise the same tokens, within the memory that was given, with counters that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exactness import Pair, case, same, worst
from models import tiny, tokens
from plait import offload_experts
from plait.parallel import PlanError
from plait.parallel.experts.cache import ExpertCache
from plait.parallel.experts.offload import expert_bytes
from world import run_calls


def generated(model: Any) -> torch.Tensor:
    ids = tokens(2, 7)
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9), use_cache=False).logits


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("family", "room"), [("qwen3_moe", 11), ("gpt_oss", 6)])
def test_decoding_is_bitwise_the_same(family: str, room: int, ahead: bool) -> None:
    model = tiny(family, dtype=torch.float32)
    whole = offload_experts(model, "1GiB", look_ahead=False)  # the same kernels, everything at hand
    expected, right = generated(model), logits(model)
    assert whole.counters.evictions == 0
    assert whole.counters.misses <= sum(
        len(layer.mlp.experts.down_proj) for layer in model.model.layers
    )
    whole.close()
    size = expert_bytes(model.model.layers[0].mlp.experts)
    small = offload_experts(model, room * size, look_ahead=ahead)
    assert all(p.is_meta for p in model.model.layers[0].mlp.experts.parameters())
    assert same(generated(model), expected) == same(logits(model), right) == 0.0
    told = small.counters
    assert told.most_bytes == room * size
    assert told.fetched_bytes == (told.misses + told.early) * size
    assert told.evictions == told.misses + told.early - room
    assert (told.early > 0) == ahead
    assert told.hits + told.misses == whole.counters.hits + whole.counters.misses, "needed as often"
    assert told.wasted < max(told.early, 1), "what comes early is of use"
    small.close()
    assert not any(p.is_meta for p in model.parameters())


def test_a_model_on_meta_reads_experts_from_disk(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("mixtral", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    whole = offload_experts(model, "1GiB", look_ahead=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config).eval()
    size = expert_bytes(model.model.layers[0].mlp.experts)
    experts = offload_experts(empty, 2 * size, weights=tmp_path)
    assert same(generated(empty), generated(model)) == 0.0
    assert experts.counters.most_bytes == 2 * size
    assert experts.counters.misses > 4
    held = sum(p.numel() for p in empty.parameters() if not p.is_meta)
    assert held < 0.7 * sum(p.numel() for p in empty.parameters()), "experts are not in memory"
    whole.close()


def cut(plan: str) -> dict[str, float]:
    pair = Pair.of(case(plan, "qwen3_moe"))
    right = generated(pair.reference)
    experts = offload_experts(pair.model, 2 * expert_bytes(pair.model.model.layers[0].mlp.experts))
    found = generated(pair.model)
    assert experts.counters.evictions > 0
    experts.close()
    return {"tokens": same(found, right), "back": same(generated(pair.model), right)}


def test_a_cut_model() -> None:
    plans = ["tp2 ep2", "kvp2 ep1 etp2"]
    for answers in run_calls([(cut, plan) for plan in plans], 2):
        assert worst(answers) == {"tokens": 0.0, "back": 0.0}


def test_refusals() -> None:
    model = tiny("mixtral", dtype=torch.float32)
    with pytest.raises(PlanError, match="do not hold one expert"):
        offload_experts(model, 100)
    with pytest.raises(PlanError, match="finds no packed experts"):
        offload_experts(tiny("llama"), "1GiB")
    experts = offload_experts(model, "1GiB")
    with pytest.raises(RuntimeError, match="for inference"):
        model(tokens(1, 3))
    experts.close()


def test_the_least_recently_used_leaves() -> None:
    fetched: list[int] = []

    def fetch(key: tuple[str, int]) -> dict[str, torch.Tensor]:
        fetched.append(key[1])
        return {"w": torch.full((1,), float(key[1]))}

    cache = ExpertCache(fetch, 3, {"a": 1})
    for e in (0, 1, 2, 0, 3, 0, 1):
        assert cache.get(("a", e))["w"] == e
    assert fetched == [0, 1, 2, 3, 1]
    cache.expect([("a", 5), ("a", 6), ("a", 7)], [("a", 0)])
    assert cache.get(("a", 0))["w"] == 0
    assert cache.get(("a", 5))["w"] == 5
    assert (cache.counters.early, cache.counters.hits, cache.counters.misses) == (2, 4, 5)
    cache.get(("a", 8))
    assert cache.counters.wasted == 1, "6 came and was not needed"
    cache.close()
