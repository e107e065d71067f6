"""`generate` over a store that evicts: as if exactly the evicted tokens were masked, and with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from models import tiny, tokens
from plait.kvstore.engines.compressed import CompressedCache, compressed_store
from plait.kvstore.engines.transformers import PlaitCache, make_store

LAYERS = 3


class Recorded(CompressedCache):
    """Writes down what each head could see when a layer attended: `seen[forward][layer][row][head]` places."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[Any]] = []

    def places(self, seq, layer):
        read, lanes = self.store.pool.read, seq.lanes[layer]
        return [torch.from_numpy(read(lanes, head)[2]).long() for head in range(len(lanes.counts))]

    def attend(self, module, layer, query, attention_mask, scaling=None, **kwargs):
        if layer == 0:
            self.seen.append([])
        seen = None if self.columns == 0 else [self.places(seq, layer) for seq in self.seqs]
        self.seen[-1].append(seen)
        return super().attend(module, layer, query, attention_mask, scaling, **kwargs)


class Oracle:
    """Dense attention over all tokens, in which what a run could not see is masked, head by head."""

    def __init__(self, seen: list[list[Any]], pads: list[int]) -> None:
        self.seen, self.pads, self.forward = seen, pads, -1

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx == 0:
            self.forward += 1
        seen = self.seen[self.forward][module.layer_idx]
        batch, heads, new, _ = query.shape
        columns, kv_heads = key.shape[2], key.shape[1]
        row = torch.arange(columns - new, columns)[:, None]
        column = torch.arange(columns)
        allowed = (column <= row).expand(batch, kv_heads, new, columns).clone()
        window = kwargs.get("sliding_window")
        if window is not None:
            allowed &= column > row - window
        for b, pad in enumerate(self.pads):
            allowed[b, :, :, :pad] = False
            if seen is not None:
                for h in range(kv_heads):
                    kept = torch.zeros(columns, dtype=torch.bool)
                    kept[seen[b][h] + pad] = True
                    allowed[b, h] &= kept
        group = heads // kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = query @ k.transpose(2, 3) * scaling
        scores = scores.masked_fill(~allowed.repeat_interleave(group, 1), -torch.inf)
        return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2), None


def run(model, ids, mask, cache, new: int = 10, **options):
    """Greedy generation: (tokens, logits of each step)."""
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def batch(pads=(0, 7, 3), length: int = 40):
    ids = tokens(len(pads), length)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


def model_of(name: str, **changes: Any):
    model = tiny(name, layers=LAYERS, **changes)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


POLICIES = {
    "snapkv": ("snapkv:window=6,budget=0.4", None),
    "ada, each head its own number": ("snapkv:window=4,budget=0.4,rule=(ada:floor=0.2)", None),
    "pyramid": ("snapkv:window=4,budget=12,rule=(pyramid:window=4,beta=4.0)", None),
    "h2o, while decoding": ("h2o:budget=10,every=2", None),
    "tova, each token": ("tova:budget=8,every=1", None),
    "streaming": ("streaming:sinks=2,budget=9,every=1", None),
    "dms threshold": ("keydiff:budget=1.0,rule=(threshold:tau=-0.3,window=5),every=3", None),
    "expected": ("expected:future=8,sinks=2,budget=0.3", None),
    "critical": ("critical:base=(snapkv:window=4),budget=0.3", None),
    "lagkv": ("lagkv:lag=8,sinks=2,budget=0.5", None),
    "snapkv while decoding": ("snapkv:window=4,budget=9,every=4", None),
    "by layer": ("knorm:budget=0.3", {0: None, 2: "tova:budget=7"}),
}


CASES = [("llama", policy) for policy in POLICIES]
CASES += [(name, policy) for name in ("qwen3", "mistral") for policy in list(POLICIES)[:3]]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_as_if_the_evicted_were_masked(name, policy) -> None:
    scorer, layers = POLICIES[policy]
    wide = {"sliding_window": 20} if name == "mistral" else {}
    model, (ids, mask) = model_of(name, **wide), batch()
    plain = model.config._attn_implementation
    store = compressed_store(model, scorer, layers, page_tokens=4)
    with Recorded(store, ids, mask) as cache:
        got, logits = run(model, ids, mask, cache)
        cache.commit()
        store.check_integrity()
        assert any((seq.kept < seq.tokens).all(1).any() for seq in cache.seqs)
    assert store.report()["held_bytes"] == 0, "closed sequences hold nothing"
    AttentionInterface.register("oracle", Oracle(cache.seen, [0, 7, 3]))
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.set_attn_implementation("oracle")
    want, expected = run(model, ids, mask, DynamicCache(config=None))
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    model.set_attn_implementation(plain)
    _, whole = run(model, ids, mask, None)
    assert not torch.allclose(logits, whole, atol=1e-4), "evicting must show"


@pytest.mark.parametrize(
    "scorer", ["snapkv:budget=1.0", "h2o:budget=500", "tova:budget=1.0,every=4"]
)
def test_a_budget_of_everything_changes_no_bit(scorer) -> None:
    model, (ids, _) = model_of("llama"), batch(pads=(0, 0))
    store = compressed_store(model, scorer, page_tokens=4)
    with CompressedCache(store, ids) as cache:
        got, logits = run(model, ids, None, cache)
    with PlaitCache(make_store(model, page_tokens=4), ids, in_place=True) as whole:
        want, expected = run(model, ids, None, whole)
    assert torch.equal(got, want)
    assert torch.equal(logits, expected)


def test_sampling_and_beams_share_what_was_kept() -> None:
    model, (ids, mask) = model_of("llama"), batch()
    store = compressed_store(model, "snapkv:window=6,budget=0.4", page_tokens=4)
    with CompressedCache(store, ids, mask) as cache:
        want, _ = run(model, ids, mask, cache, num_beams=1)
    with CompressedCache(store, ids, mask, repeats=2) as cache:
        torch.manual_seed(3)
        got = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=True,
            num_return_sequences=2, temperature=1e-4,
        )  # fmt: skip
    assert torch.equal(got[::2], want), "so cold that it is greedy"
    with CompressedCache(store, ids, mask, repeats=3) as cache:
        beams = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False,
            num_beams=3,
        )  # fmt: skip
        assert store.pool.pool.counters.shared > 0
        store.check_integrity()
    assert beams.shape == want.shape
    assert store.report()["held_bytes"] == 0


def test_a_second_prompt_is_chosen_among_with_what_was_kept() -> None:
    """Two turns by hand; the oracle sees exactly what each head kept."""
    model, ids, more = model_of("llama"), tokens(2, 40), tokens(2, 12, seed=5)
    store = compressed_store(
        model, "snapkv:window=4,budget=0.3,rule=(ada:floor=0.2)", page_tokens=4
    )
    turns = [ids, more, more[:, :1], ids[:, :9], ids[:, :1]]
    with torch.no_grad(), Recorded(store, ids) as cache:
        got = [model(turn, past_key_values=cache).logits for turn in turns]
        assert cache.get_seq_length() == sum(turn.shape[1] for turn in turns)
        text = sum(turn.shape[1] for turn in turns)
        assert int(cache.seqs[0].kept.mean()) == int(0.3 * (text - 1)) + 1
    AttentionInterface.register("oracle", Oracle(cache.seen, [0, 0]))
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.set_attn_implementation("oracle")
    past = DynamicCache(config=None)
    with torch.no_grad():
        want = [model(turn, past_key_values=past).logits for turn in turns]
    for own, other in zip(got, want, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "scorer",
    [
        "snapkv:window=4,budget=0.4,rule=(ada:floor=0.2)",
        "h2o:budget=9,every=2",
        "lagkv:lag=5,sinks=1,budget=0.5",
    ],
)
def test_padding_and_neighbours_change_nothing(scorer) -> None:
    """A row of a padded batch keeps the tokens that it keeps alone, without padding."""
    model, (ids, mask) = model_of("llama"), batch()

    def kept(ids, mask):
        store = compressed_store(model, scorer, page_tokens=4)
        with CompressedCache(store, ids, mask) as cache:
            run(model, ids, mask, cache, new=6)
            cache.commit()
            read = store.pool.read
            return [
                [read(lanes, head)[2].tolist() for lanes in seq.lanes for head in range(4)]
                for seq in cache.seqs
            ]

    together = kept(ids, mask)
    for row, pad in enumerate((0, 7, 3)):
        assert kept(ids[row : row + 1, pad:], None) == together[row : row + 1]


def test_memory_is_freed_layer_by_layer() -> None:
    """A prompt never stands in pages as a whole, and what stays is what the budget says."""
    model, ids = model_of("llama"), tokens(2, 200)
    store = compressed_store(model, "snapkv:window=6,budget=0.1", page_tokens=4)
    with CompressedCache(store, ids) as cache:
        run(model, ids, None, cache, new=3)
        cache.commit()
        said = store.report()
        page = store.pool.bytes_per_page
        layers, heads = store.spec.layers, store.spec.kv_heads
        assert said["held_bytes"] == 2 * layers * heads * page * -(-(20 + 2) // 4)
        assert said["whole_bytes"] == 2 * 202 * store.spec.bytes_per_token
        assert said["kept_tokens"] == 2 * 22
        assert said["ratio"] < 0.13
        assert said["peak_bytes"] == said["held_bytes"], "no page ever held the whole prompt"
        del cache
    assert store.report()["held_bytes"] == 0


def test_tokens_may_be_chosen_where_gradients_are_on() -> None:
    """A user's last commit stands outside `generate`, and output projections are parameters."""
    model, (ids, _) = model_of("llama"), batch(pads=(0,))
    scorer = "critical:base=keydiff,budget=6,every=1,rule=(threshold:tau=0.01,window=3)"
    store = compressed_store(model, scorer, page_tokens=4)
    with CompressedCache(store, ids) as cache:
        run(model, ids, None, cache, new=3)
        chosen = store.keeper.choices
        cache.commit()
        assert store.keeper.choices > chosen


def test_a_model_that_works_on_cached_keys_is_refused_at_once() -> None:
    model = model_of("deepseek")
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM works on cached keys"):
        compressed_store(model, "knorm")
    assert model.config._attn_implementation == "sdpa", "as it was"


def test_what_cannot_be_is_said() -> None:
    model, (ids, mask) = model_of("llama"), batch()
    store = compressed_store(model, "snapkv:window=6,budget=0.4", page_tokens=4)
    with CompressedCache(store, ids) as cache, pytest.raises(ValueError, match="attention_mask="):
        run(model, ids, mask, cache)
    with CompressedCache(store, ids, mask) as cache:
        run(model, ids, mask, cache, new=2)
        with pytest.raises(ValueError, match="holds 3 rows, the input 1"):
            model.generate(ids[:1], past_key_values=cache, max_new_tokens=2)
        cache.crop(-1)
        with pytest.raises(ValueError, match="do not come back"):
            cache.crop(-8)
        cache.reset()
        assert cache.get_seq_length() == 0
    with CompressedCache(store, ids, mask) as cache, pytest.raises(ValueError, match="no_grad"):
        model(ids, past_key_values=cache)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="stands in for 'sdpa'"):
        compressed_store(model, "snapkv")
    store.check_integrity()


def test_a_document_is_computed_once_for_scorers_of_keys() -> None:
    model, ids = model_of("llama"), tokens(1, 60)
    store = compressed_store(model, "keydiff:budget=0.5", page_tokens=4)
    with CompressedCache(store, ids[:, :50]) as cache:
        run(model, ids[:, :50], None, cache, new=2)
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: counts.append(out.shape[1])
    )
    with CompressedCache(store, ids) as cache:
        assert cache.cached_tokens == 50
        run(model, ids, None, cache, new=3)
    hook.remove()
    assert counts == [10, 1, 1]
    store.check_integrity()


def test_kvzip_keeps_what_the_text_needs_to_be_repeated() -> None:
    """Against the attention weights that the model itself gives out, over the text and its repetition in one go."""
    model, ids, ask = model_of("llama"), tokens(2, 30), tokens(1, 3, seed=7)[0]
    store = compressed_store(model, "kvzip:budget=0.3", page_tokens=4)
    with torch.no_grad(), CompressedCache(store, ids) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="30 cached tokens"):
            cache.reconstruct(model, ids[:, :20])
        cache.commit()
        assert int(cache.seqs[0].kept.min()) == 30, "whole until the text was repeated"
        cache.reconstruct(model, ids, ask, chunk=16)
        assert cache.get_seq_length() == 30
        read = store.pool.read
        kept = [
            [[read(seq.lanes[layer], head)[2].tolist() for head in range(4)] for layer in range(LAYERS)]
            for seq in cache.seqs
        ]  # fmt: skip
        store.check_integrity()
        model(ids[:, :4], past_key_values=cache)
    model.set_attn_implementation("eager")
    score = torch.zeros(LAYERS, 2, 4, 30, dtype=torch.float64)
    with torch.no_grad():
        for part in ids.split(16, 1):
            again = torch.cat([ids, ask.expand(2, -1), part], 1)
            weights = torch.stack(model(again, output_attentions=True).attentions)
            heard = weights[..., 30:, :30].unflatten(2, (4, 2)).amax((3, 4))
            score = score.maximum(heard)
    ranked = score.sort(dim=-1, descending=True, stable=True).indices
    want = ranked[..., :9].sort(dim=-1).values
    for row in range(2):
        assert [want[layer, row].tolist() for layer in range(LAYERS)] == kept[row]
    assert not store.private, "no request was asked"
