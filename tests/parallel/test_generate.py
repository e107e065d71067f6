"""transformers' generate, unchanged, under tensor parallel and Helix: token for token the untouched model's."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exactness import EXACT, Pair, case, check_cache, far, padded, same
from models import tiny, tokens
from plait.collectives import primitive
from plait.parallel import PlanError, parallelize
from world import run_world


def ways(plan: str, family: str, names: tuple[str, ...]) -> dict[str, float]:
    """Several ways of generating; 0 where all tokens are those of the untouched model."""
    pair = Pair.of(case(plan, family))
    answers = {name: WAYS[name](pair) for name in names}
    gc.collect()
    cache = pair.model.kv_cache() if hasattr(pair.model, "kv_cache") else None
    if cache is not None:  # every cache that generate made is gone, and its pages with it
        cache.store.check_integrity()
        left = cache.store.counters()
        assert left["sequences"] == 0, left
        assert left["pages_free"] == left["pages"], left
    return answers


def both(
    pair: Pair, ids: Any = None, mask: Any = None, seed: int | None = None, **options: Any
) -> float:
    """Generate with both models from the same seed and compare every token."""
    if ids is None:
        ids, mask = padded(pair)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0} | options
    found = []
    for model in (pair.reference, pair.model):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(model.generate(ids, attention_mask=mask, **options))
    return same(found[1], found[0])


def sampling(pair: Pair) -> float:
    """From one seed the tokens are those of a single process with that seed."""
    return both(pair, seed=7, do_sample=True, temperature=1.3, top_k=20, max_new_tokens=12)


def unlike_seeds(pair: Pair) -> float:
    """Ranks with different generators draw rank 0's numbers."""
    ids, mask = padded(pair)
    torch.manual_seed(100 + dist.get_rank())
    found = pair.model.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=9, pad_token_id=0
    )
    torch.manual_seed(100)
    expected = pair.reference.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=9, pad_token_id=0
    )
    return same(found, expected)


def beams(pair: Pair) -> float:
    return both(pair, num_beams=3, max_new_tokens=8)


def returned_beams(pair: Pair) -> float:
    return both(pair, num_beams=4, num_return_sequences=2, max_new_tokens=6, length_penalty=0.3)


def several(pair: Pair) -> float:
    return both(pair, seed=3, do_sample=True, num_return_sequences=3)


def lookup(pair: Pair) -> float:
    """Prompt lookup: several query tokens a step, and a crop after each rejection."""
    ids = tokens(1, 4, seed=6).repeat(1, 5)
    return both(pair, ids, torch.ones_like(ids), prompt_lookup_num_tokens=3, max_new_tokens=14)


def assisted(pair: Pair) -> float:
    """A draft of another, untouched model, and one of the model itself, which is all accepted."""
    ids = tokens(1, 11, seed=8)
    mask = torch.ones_like(ids)
    expected = pair.reference.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    draft = tiny(FAMILY_OF[type(pair.reference).__name__], seed=1)
    worst = 0.0
    for assistant in (draft, copy.deepcopy(pair.reference)):
        found = pair.model.generate(
            ids,
            attention_mask=mask,
            assistant_model=assistant,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )
        worst = max(worst, same(found, expected))
    return worst


FAMILY_OF = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3", "DeepseekV3ForCausalLM": "deepseek",
             "Gemma3ForCausalLM": "gemma3", "GptOssForCausalLM": "gpt_oss"}  # fmt: skip


def twice(pair: Pair) -> float:
    first = both(pair)
    ids = tokens(3, 5, seed=9)
    return max(first, both(pair, ids, torch.ones_like(ids)))


def without_cache(pair: Pair) -> float:
    return both(pair, use_cache=False, max_new_tokens=4)


def conversation(pair: Pair) -> float:
    """A second turn on the cache of the first, handed over by the caller."""
    if not hasattr(pair.model, "kv_cache"):
        return 0.0
    cache = pair.model.kv_cache()
    first = tokens(1, 9, seed=12)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    turn = pair.model.generate(
        first, attention_mask=torch.ones_like(first), past_key_values=cache, **options
    )
    expected = pair.reference.generate(first, attention_mask=torch.ones_like(first), **options)
    second = torch.cat([turn, tokens(1, 5, seed=13)], 1)
    check_cache(cache)
    again = pair.model.generate(
        second, attention_mask=torch.ones_like(second), past_key_values=cache, **options
    )
    whole = pair.reference.generate(second, attention_mask=torch.ones_like(second), **options)
    check_cache(cache)
    assert cache.lengths[0] == again.shape[1] - 1
    return max(same(turn, expected), same(again, whole))


def scores(pair: Pair) -> float:
    """The scores that generate returns, not only the tokens."""
    ids, mask = padded(pair)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = [
        m.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )
        for m in (pair.reference, pair.model)
    ]
    return max(far(f, e) for f, e in zip(made[1].logits, made[0].logits, strict=True))


WAYS: dict[str, Callable[[Pair], float]] = {
    f.__name__: f
    for f in (
        scores,
        sampling,
        unlike_seeds,
        beams,
        returned_beams,
        several,
        lookup,
        assisted,
        twice,
        without_cache,
        conversation,
    )
}
FEW = ("scores", "beams", "lookup", "conversation")
CELLS = [(2, plan, "llama", tuple(WAYS)) for plan in ("tp2", "kvp2,interleave=2")] + [
    (2, "kvp2,interleave=2,exchange=kv", "llama", FEW),
    (2, "kvp2,interleave=3,exchange=partials", "deepseek", FEW),
    (2, "kvp2,interleave=2", "gemma3", FEW),
    (2, "kvp2,interleave=2", "gpt_oss", FEW),
    (4, "kvp2,interleave=2 tp2", "llama", FEW),
]


@pytest.mark.parametrize(
    ("size", "plan", "family", "names"), CELLS, ids=[f"{p}-{f}" for _, p, f, _ in CELLS]
)
def test_generation_gives_the_same_tokens(
    size: int, plan: str, family: str, names: tuple[str, ...]
) -> None:
    for rank, answers in enumerate(run_world(ways, size, plan, family, names)):
        print(rank, answers)
        assert answers.keys() == set(names)
        wrong = {name: error for name, error in answers.items() if not error <= EXACT}
        assert not wrong


def static() -> str:
    model = parallelize(tiny("llama"), "kvp2")
    ids = tokens(1, 5)
    with pytest.raises(PlanError) as refused:
        model.generate(ids, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    return str(refused.value)


def test_a_static_cache_is_refused() -> None:
    for said in run_world(static, 2):
        assert "static" in said
        assert "leave it out" in said


def sampled_without_sharing() -> int:
    """What unlike generators do if nothing shares them: the control of ``unlike_seeds``."""
    from plait.parallel import binding

    binding.share_random_state = lambda ranks: None
    pair = Pair.of(case("tp2", "llama"))
    ids, mask = padded(pair)
    torch.manual_seed(100 + dist.get_rank())
    found = pair.model.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=9, pad_token_id=0
    )
    every = primitive.all_gather(found[None], dist.group.WORLD)
    return every.flatten(1).unique(dim=0).shape[0]


def test_unlike_generators_would_be_noticed() -> None:
    assert run_world(sampled_without_sharing, 2) == [2, 2]
