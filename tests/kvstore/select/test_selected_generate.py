"""Selectors under transformers' generate, over whole and over compressed stores."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

from plait.kvstore.compress.compression import CompressionError
from plait.kvstore.engines.compressed import CompressedCache, compressed_store
from plait.kvstore.engines.pages import read_pages_in_place
from plait.kvstore.engines.transformers import PlaitCache, make_store

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NAMES = [
    "exact", "quest:page=4", "sparq", "rocket", "rocket-mt", "delta:full=0+1,page=4,newest=1",
    "hylra:full=0+1",
]  # fmt: skip


def llama(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    model = kind(config(**SIZES, **options)).double().eval()
    read_pages_in_place(model)
    return model


@pytest.fixture(scope="module")
def model():
    return llama()


def prompts(rows: int = 2, tokens: int = 45) -> torch.Tensor:
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


def generate(model, cache, ids, new: int = 12) -> torch.Tensor:
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def with_selector(model, ids, selector: str | None, new: int = 12) -> torch.Tensor:
    store = make_store(model, 8, weights="test", selector=selector)
    with PlaitCache(store, ids, in_place=True) as cache:
        found = generate(model, cache, ids, new)
    store.check_integrity()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_is_dense_to_the_bit(model, name) -> None:
    ids = prompts()
    whole = with_selector(model, ids, None)
    full = with_selector(model, ids, f"{name}{',' if ':' in name else ':'}budget=1")
    assert torch.equal(full, whole)
    few = with_selector(model, ids, f"{name}{',' if ':' in name else ':'}budget=12")
    assert few.isfinite().all()
    assert not torch.allclose(few, whole)
    assert torch.equal(few[:, 0], whole[:, 0]), "the prompt is read whole"


@torch.no_grad()
def test_a_selection_is_attention_with_a_mask(model) -> None:
    """Step by step against the model's own attention, to which the same tokens are shown."""
    ids = prompts(1)
    store = make_store(model, 8, weights="test", selector="recent:tokens=10")
    with PlaitCache(store, ids, in_place=True) as cache:
        model(ids, past_key_values=cache)
        got = model(ids[:, :1], past_key_values=cache).logits
    plain = DynamicCache()
    model(ids, past_key_values=plain)
    mask = torch.zeros(1, 1, 1, 46, dtype=torch.bool)
    mask[..., 36:] = True
    want = model(ids[:, :1], past_key_values=plain, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_beams_and_windows(model) -> None:
    ids = prompts(1)
    store = make_store(model, 8, weights="test", selector="exact:budget=0.5")
    with PlaitCache(store, ids, repeats=3, in_place=True) as cache:
        out = model.generate(ids, past_key_values=cache, max_new_tokens=8, num_beams=3)
    assert out.shape[1] == 53
    slid = llama(MistralForCausalLM, MistralConfig, sliding_window=16)
    dense = with_selector(slid, ids, None)
    assert torch.equal(with_selector(slid, ids, "exact:budget=0.2"), dense), "windows stay windows"


def test_a_selector_that_could_not_act_is_refused(model) -> None:
    store = make_store(model, 8, weights="test", selector="quest")
    with pytest.raises(ValueError, match="in_place=True"):
        PlaitCache(store, prompts())


# ---- after eviction


@pytest.mark.parametrize("name", ["exact", "quest:page=4", "rocket", "sparq", "top-p:page=4"])
def test_what_is_kept_is_read_in_part(model, name) -> None:
    ids, evict = prompts(), "snapkv:window=8,budget=24"
    results = []
    full = "pages=1" if name.startswith("top") else "budget=1"
    few = "share=0.5" if name.startswith("top") else "budget=6"
    joint = "," if ":" in name else ":"
    for selector in (None, f"{name}{joint}{full}", f"{name}{joint}{few}"):
        store = compressed_store(model, evict, page_tokens=8, selector=selector)
        with CompressedCache(store, ids) as cache:
            results.append(generate(model, cache, ids))
        store.check_integrity()
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    assert results[2].isfinite().all()


@pytest.mark.parametrize(
    ("scorer", "selector", "complaint"),
    [
        ("knorm:budget=0.5", "delta:full=0", "do not hold the same"),
        ("knorm:budget=0.5", "rocket-mt", "kept whole"),
        ("h2o:budget=0.5", "quest", "attention that every token receives"),
    ],
)
def test_what_does_not_compose_is_refused(model, scorer, selector, complaint) -> None:
    with pytest.raises(CompressionError, match=complaint):
        compressed_store(model, scorer, selector=selector)
