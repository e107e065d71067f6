"""`generate` of plain transformers models over the store: same tokens as without, prefixes skipped."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from plait.kvstore import KVStore
from plait.kvstore.engines.compressed import compressed_store
from plait.kvstore.engines.pages import read_pages_in_place
from plait.kvstore.engines.transformers import PlaitCache, make_store, weights_digest

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "gemma3, windows in some layers": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=7, sliding_window_pattern=3)
    ),
    "gemma3n, layers that read the keys of others": lambda: Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **SIZES | {"num_hidden_layers": 4}, head_dim=8, sliding_window=7, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
        )
    ),
}  # fmt: skip
GATHERED = {  # their attention cannot read pages in place
    "falcon, one KV head": lambda: FalconForCausalLM(
        FalconConfig(**SIZES, multi_query=True, alibi=False, new_decoder_architecture=False)
    ),
    "deepseek v3, latents": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16, n_shared_experts=1,
        )
    ),
}  # fmt: skip


def make(name: str = "llama"):
    torch.manual_seed(0)
    return (MODELS | GATHERED)[name]().eval()


def generate(model, ids, cache, **options):
    """Decode greedily; give the sequences and the number of tokens of each forward."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: counts.append(out.shape[1])
    )
    out = model.generate(
        ids, past_key_values=cache, do_sample=False, **{"max_new_tokens": 9, **options}
    )
    hook.remove()
    return out, counts


@pytest.mark.parametrize("name", MODELS | GATHERED)
def test_same_tokens_and_a_cached_prefix_is_not_computed_again(name) -> None:
    model = make(name)
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (1, 30))
    want, _ = generate(model, ids, DynamicCache(config=model.config))
    for cached, first in ((0, 30), (29, 1)):
        with PlaitCache(store, ids) as cache:
            got, counts = generate(model, ids, cache)
            assert torch.equal(got, want)
            assert (cache.cached_tokens, counts[0], sum(counts)) == (cached, first, first + 8)
            cache.tell(got)
        store.check_integrity()
    more = torch.cat([want, torch.randint(1, 64, (1, 5))], 1)
    longer, _ = generate(model, more, DynamicCache(config=model.config))
    with PlaitCache(store, more[0]) as cache:
        got, counts = generate(model, more, cache)
    assert torch.equal(got, longer)
    assert counts[0] == 6, "the last generated token was never computed"
    counters = store.counters()
    assert counters["tokens_found"] == 29 + 38
    assert counters["pages_free"] + counters["pages_cached"] == counters["pages"]


def test_noise_in_the_cached_pages_changes_the_answer() -> None:
    """So the pages are what attention reads."""
    model = make()
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (1, 30))
    with PlaitCache(store, ids) as cache:
        want, _ = generate(model, ids, cache)
    for region in store.pool.values:
        region.normal_()
    with PlaitCache(store, ids) as cache:
        got, _ = generate(model, ids, cache)
    assert not torch.equal(got, want)


@pytest.mark.parametrize("side", ["left", "none"])
def test_a_batch_and_its_prefixes(side) -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (3, 20))
    ids[1, :14] = ids[0, :14]
    mask = torch.ones_like(ids)
    if side == "left":
        ids[2, :5], mask[2, :5] = 0, 0
    want, _ = generate(model, ids, None, attention_mask=mask)
    for cached in (0, 0 if side == "left" else 19):
        with PlaitCache(store, ids, attention_mask=mask) as cache:
            assert cache.cached_tokens == cached
            got, counts = generate(model, ids, cache, attention_mask=mask)
        assert torch.equal(got, want)
        assert counts[0] == 20 - cached
        store.check_integrity()
    other = torch.cat([ids[:2], torch.randint(1, 64, (1, 20))])
    with PlaitCache(store, other) as cache:
        assert cache.cached_tokens == 0, "rows start together"
        assert torch.equal(generate(model, other, cache)[0], generate(model, other, None)[0])


def test_beams_and_sampled_answers_share_the_prompt() -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (1, 21))
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        want, _ = generate(model, ids, None, **options)
        with PlaitCache(store, ids, repeats=options["num_beams"]) as cache:
            got, _ = generate(model, ids, cache, **options)
            with pytest.raises(ValueError, match="rows do not say"):
                cache.tell(got)
        assert torch.equal(got, want)
        store.check_integrity()
    assert store.counters()["tokens_found"] == 4 * 20
    options = {"num_return_sequences": 3, "do_sample": True}
    with PlaitCache(store, ids, repeats=3) as cache:
        got = model.generate(ids, past_key_values=cache, max_new_tokens=9, **options)
        cache.tell(got)
    assert store.match(list(torch.cat([got, got[:, :1]], 1))) == [29, 29, 29]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_decode_from_pages_in_place_gives_the_same_tokens(name, batch, monkeypatch) -> None:
    model = make(name)
    ids = torch.randint(1, 64, (batch, 30))
    want, _ = generate(model, ids, None, max_new_tokens=12)
    read_pages_in_place(model)
    reads: list[int] = []
    attend = KVStore.attend
    monkeypatch.setattr(
        KVStore,
        "attend",
        lambda self, *args, **more: reads.append(1) or attend(self, *args, **more),
    )
    store = make_store(model, page_tokens=4)
    for _ in range(2):
        with PlaitCache(store, ids, in_place=True) as cache:
            got, _ = generate(model, ids, cache, max_new_tokens=12)
            assert torch.equal(got, want)
    layers = model.config.num_hidden_layers
    assert len(reads) >= 2 * 11 * layers - layers, "each layer of each step of one token"
    with PlaitCache(store, ids) as cache:
        assert torch.equal(generate(model, ids, cache, max_new_tokens=12)[0], want)
    assert torch.equal(generate(model, ids, None, max_new_tokens=12)[0], want)


def test_padded_rows_are_gathered_and_other_attention_is_refused() -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    ids, mask = torch.randint(1, 64, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    want, _ = generate(model, ids, None, attention_mask=mask)
    with (
        PlaitCache(store, ids, attention_mask=mask, in_place=True) as cache,
        pytest.raises(TypeError, match="read_pages_in_place"),
    ):
        generate(model, ids, cache, attention_mask=mask)
    read_pages_in_place(model)
    with PlaitCache(store, ids, attention_mask=mask, in_place=True) as cache:
        assert torch.equal(generate(model, ids, cache, attention_mask=mask)[0], want)
    eager = make()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attends by 'eager'"):
        read_pages_in_place(eager)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("falcon, one KV head", ValueError, "attention built in"),
        ("deepseek v3, latents", TypeError, "latent attention"),
    ],
)
def test_attention_that_cannot_read_pages_says_so(name, error, said) -> None:
    model, ids = make(name), torch.randint(1, 64, (1, 12))

    def decode() -> None:
        read_pages_in_place(model)
        with PlaitCache(make_store(model, page_tokens=4), ids, in_place=True) as cache:
            generate(model, ids, cache)

    with pytest.raises(error, match=said):
        decode()


def test_layers_of_two_shapes_do_not_fit_in_pages() -> None:
    model = make()
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(32, 4 * 8, bias=False))
    attention.num_key_value_groups = 1
    with pytest.raises(ValueError, match="of 2 shapes or places"):
        make_store(model)


def test_layers_that_share_keys_cannot_choose_what_to_keep() -> None:
    with pytest.raises(ValueError, match="2 layers of Gemma3nForCausalLM read the keys of others"):
        compressed_store(make("gemma3n, layers that read the keys of others"), "snapkv:budget=0.25")


def test_the_prefix_of_another_process_is_found_on_disk(tmp_path) -> None:
    model = make()
    ids = torch.randint(1, 64, (1, 30))
    want, _ = generate(model, ids, None)
    options = {"page_tokens": 4, "disk": tmp_path / "c", "disk_bytes": "4MiB", "fetch": "always"}
    for cached in (0, 28):
        with make_store(model, **options) as store, PlaitCache(store, ids) as cache:
            got, counts = generate(model, ids, cache)
            assert torch.equal(got, want)
            assert (cache.cached_tokens, counts[0]) == (cached, 30 - cached)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    with make_store(model, **options) as store, PlaitCache(store, ids) as cache:
        assert cache.cached_tokens == 0, "other weights"


def test_tenants_and_other_models_find_nothing() -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (1, 12))
    for tenant in (None, "a", "b"):
        with PlaitCache(store, ids, tenant=tenant) as cache:
            assert cache.cached_tokens == 0
            generate(model, ids, cache)
    digest = weights_digest(model)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    assert weights_digest(model) != digest


def test_an_interrupted_forward_is_dropped() -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (1, 12))
    want, _ = generate(model, ids, None)
    hook = model.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
    with PlaitCache(store, ids) as cache:
        with pytest.raises(ZeroDivisionError):
            generate(model, ids, cache)
        hook.remove()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, ids, cache)[0], want)
    store.check_integrity()


def test_misuse_is_refused() -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    ids = torch.randint(1, 64, (1, 12))
    with PlaitCache(store, ids) as cache:
        with pytest.raises(ValueError, match="no_grad"):
            model(ids, past_key_values=cache)
        with torch.no_grad(), pytest.raises(ValueError, match="holds 1 rows, the input 2"):
            model(ids.repeat(2, 1), past_key_values=cache)
        got, _ = generate(model, ids, cache)
        with pytest.raises(ValueError, match="do not begin with the ids"):
            cache.tell(got + 1)
        with pytest.raises(ValueError, match="negative number"):
            cache.crop(1)
        cache.crop(-3)
        assert cache.get_seq_length() == 17
        cache.reset()
        assert cache.get_seq_length() == 0
    model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        make_store(model)


def test_a_dropped_cache_keeps_no_pages() -> None:
    model = make()
    store = make_store(model, page_tokens=4)
    cache = PlaitCache(store, torch.randint(1, 64, (1, 12)))
    with torch.no_grad():
        model(torch.randint(1, 64, (1, 12)), past_key_values=cache)
    del cache
    gc.collect()
    assert store.counters()["sequences"] == 0


def test_continuous_batching_refuses_a_model_that_reads_our_pages() -> None:
    """It makes its own cache and takes no other; with pages in place its attention says so, too."""
    model = make()
    read_pages_in_place(model)
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
