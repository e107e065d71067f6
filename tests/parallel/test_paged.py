"""Pages under plans of tp alone: used where they serve, and everything else as the model did it before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from exactness import EXACT, Pair, case, far, gradient_errors, loss_of, mask_of, padded, same
from models import tiny, tokens
from plait.kvstore import KVStore
from plait.parallel import PlanError, parallelize
from plait.parallel.attention import paged
from plait.parallel.attention.cache import PagedCache
from world import run_world


def forwards(pair: Pair, make: Callable[[], Any], **options: Any) -> float:
    """A prompt and three more tokens through each model's cache; the larger error."""
    ids, worst = tokens(2, 12, seed=4), 0.0
    caches = [make(), make()]
    for start, stop in ((0, 9), (9, 10), (10, 12)):
        outs = []
        for i, model in enumerate((pair.reference, pair.model)):
            out = model(ids[:, start:stop], past_key_values=caches[i], use_cache=True, **options)
            caches[i] = out.past_key_values
            outs.append(out.logits)
        worst = max(worst, far(outs[1], outs[0]))
    return worst


@torch.no_grad()
def own_caches(pair: Pair) -> float:
    """Caches that the caller brings are the ones that are used."""
    from transformers import DynamicCache, StaticCache

    config = pair.reference.config
    dynamic = forwards(pair, lambda: DynamicCache(config=config))
    static = forwards(pair, lambda: StaticCache(config=config, max_cache_len=16))
    assert isinstance(pair.model(tokens(1, 3)).past_key_values, PagedCache)
    brought = DynamicCache(config=config)
    assert pair.model(tokens(1, 3), past_key_values=brought).past_key_values is brought
    return max(dynamic, static)


@torch.no_grad()
def static_generation(pair: Pair) -> float:
    ids, mask = padded(pair)
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"
    }  # fmt: skip
    made = [m.generate(ids, attention_mask=mask, **options) for m in (pair.reference, pair.model)]
    return same(made[1], made[0])


@torch.no_grad()
def own_masks(pair: Pair) -> float:
    """A mask of four dims reaches the attention it was made for."""
    ids = tokens(2, 8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float64).masked_fill(
        torch.ones(8, 8).triu(1) > 0, -1e30
    )
    mask[:, :, 5:, :3] = -1e30  # a second document in the row
    outs = [m(ids, attention_mask=mask).logits for m in (pair.reference, pair.model)]
    assert far(outs[0], pair.reference(ids).logits) > 1e-3
    return far(outs[1], outs[0])


def training_with_a_cache(pair: Pair) -> float:
    """transformers' default keeps a cache in training too; its gradients are those of the untouched model."""
    ids = tokens(2, 10)
    for model in (pair.reference, pair.model):
        out = model(ids)
        assert not isinstance(out.past_key_values, PagedCache)
        loss_of(out.logits, torch.ones_like(ids)).backward()
    return max(gradient_errors(pair).values())


def generation_before_backward(pair: Pair) -> float:
    """Recomputation in backward uses its own forward's attention, whatever ran in between."""
    ids, mask = tokens(3, 21), mask_of()
    for model in (pair.reference, pair.model):
        model.train()
        model.activation_checkpointing_enable()
        out = model(ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            model.eval()
            model(model(ids[:, :1]).logits.argmax(-1))
            model.train()
        loss_of(out, mask).backward()
        model.activation_checkpointing_disable()
        model.eval()
    return max(gradient_errors(pair).values())


def a_forward_that_raises(pair: Pair) -> float:
    """An error in the middle leaves neither our attention nor an open step behind."""
    layer, ids = pair.model.model.layers[1], tokens(1, 6)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    handle = layer.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="stop here"):
        pair.model(ids)
    handle.remove()
    assert pair.model.config._attn_implementation == "sdpa"
    out = pair.model(ids, use_cache=False).logits
    return far(out, pair.reference(ids, use_cache=False).logits)


WAYS = (
    own_caches, static_generation, own_masks, training_with_a_cache, generation_before_backward,
    a_forward_that_raises,
)  # fmt: skip


def all_ways(family: str) -> dict[str, float]:
    return {way.__name__: way(Pair.of(case("tp2", family))) for way in WAYS}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_pages_do_not_serve_works_as_before(family: str) -> None:
    for answers in run_world(all_ways, 2, family):
        assert {name: e for name, e in answers.items() if not e <= EXACT} == {}


def given_store() -> dict[str, Any]:
    first = parallelize(tiny("llama"), "tp2")
    spec = first.kv_cache().store.spec
    store = KVStore(spec)
    model = parallelize(tiny("llama"), "tp2", store=store)
    with torch.no_grad():
        cache = model(tokens(3, 20)).past_key_values
    held = {"ours": cache.store is store, "sequences": store.counters()["sequences"]}
    store.check_integrity()
    with pytest.raises(PlanError) as refused:
        parallelize(tiny("llama", attn_implementation="eager"), "tp2", store=store)
    return held | {"refused": str(refused.value), "kv_heads": spec.kv_heads}


def test_a_given_store_is_used() -> None:
    for said in run_world(given_store, 2):
        assert (said["ours"], said["sequences"], said["kv_heads"]) == (True, 3, 2)
        assert "sdpa" in said["refused"]


def forgetful(plan: str) -> float:
    """Every step taken for a first one: attention to the new tokens alone."""
    paged.helix_attention = lambda module, q, k, v, mask, **kwargs: paged.ALL_ATTENTION_FUNCTIONS[
        "sdpa"
    ](module, q, k, v, mask, **kwargs)
    with torch.no_grad():
        return forwards(Pair.of(case(plan, "llama")), lambda: None)


def test_forgetting_the_pages_would_be_noticed() -> None:
    assert min(run_world(forgetful, 2, "tp2")) > 1e-3
