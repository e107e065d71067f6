"""Compositions: what may be said, what is refused, and what a store keeps by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.cuda_kernels import attention_reference
from plait.kvstore import KVSpec, PoolExhausted, StepError
from plait.kvstore.compress import (
    CompressedStore,
    Compression,
    CompressionError,
    LayerView,
    find_scorer,
    keep_best,
)
from plait.kvstore.compress.budgets import Ada, Uniform
from plait.kvstore.compress.scorers import SnapKV

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=6, page_tokens=4, dtype=torch.float64)
HEADS = 4


def drawn(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """k, v `[layers, tokens, kv_heads, d]`, q `[layers, tokens, heads, d]`."""
    gen = torch.Generator().manual_seed(seed)
    shape = (SPEC.layers, tokens, 2, 6)
    k, v = (torch.randn(shape, dtype=torch.float64, generator=gen) for _ in range(2))
    return k, v, torch.randn(SPEC.layers, tokens, HEADS, 6, dtype=torch.float64, generator=gen)


def fed(store: CompressedStore, seq, k: Tensor, v: Tensor, q: Tensor, sizes: list[int]):
    """Write tokens in steps of these sizes; give each step's outputs, `[steps]` of `[layers, rows, heads, d]`."""
    outs, start = [], seq.tokens
    for size in sizes:
        rows = slice(start, start + size)
        step = store.reserve([seq], [size])
        layers = []
        for layer in range(SPEC.layers):
            store.append(step, layer, k[layer, rows], v[layer, rows])
            layers.append(store.attend(seq, layer, q[layer, rows], step=step)[0])
        store.commit(step)
        outs.append(torch.stack(layers))
        start += size
    return outs


def places(store: CompressedStore, seq, layer: int) -> list[list[int]]:
    return [store.pool.read(seq.lanes[layer], head)[2].tolist() for head in range(2)]


# ---- text


@pytest.mark.parametrize(
    "text",
    [
        "snapkv:budget=0.25",
        "snapkv:window=32,budget=512",
        "knorm:budget=0.5,rule=ada",
        "snapkv:window=8,budget=0.25,rule=(ada:floor=0.3),every=64",
        "critical:base=(snapkv:window=8,kernel=3),first=0.25,budget=0.125",
        "h2o:budget=1.0,every=0",
    ],
)
def test_text_comes_back(text) -> None:
    assert str(Compression.parse(text)) == text
    assert Compression.parse(str(Compression.parse(text))) == Compression.parse(text)


def test_by_objects_and_by_name_are_the_same() -> None:
    own = Compression(SnapKV(window=8), 0.5, Ada(floor=0.3))
    assert own == Compression.parse("snapkv:window=8,budget=0.5,rule=(ada:floor=0.3)")
    assert Compression.parse("tova:budget=9").cadence == 16
    assert Compression.parse("snapkv") == Compression(SnapKV(), 0.25, Uniform(), 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapkv:budget=0", "keeps nothing; give a share"),
        ("snapkv:budget=-0.5", "keeps nothing"),
        ("snapkv:budget=1.5", "more than all"),
        ("snapkv:budget=nan", "more than all"),
        ("snapkv:budget=x", "budget='x'"),
        ("snapkv:every=-1", "at least 0"),
        ("snapkv:rule=adda", "there is no budget 'adda'"),
        ("expected:every=4", "every query of a text"),
        ("critical:base=expected,every=4", "every query of a text"),
        ("critical:base=tova", "no heads to rank apart"),
        ("kvzip:every=4", "by repeating it"),
        ("tova:rule=ada", "same tokens in all heads"),
    ],
)
def test_wrong_compositions_say_why(text, said) -> None:
    with pytest.raises(ValueError, match=said):
        Compression.parse(text)


def test_wrong_stores_say_why() -> None:
    with pytest.raises(ValueError, match="layer 7 must be in"):
        CompressedStore(SPEC, "knorm", layers={7: None})
    latent = KVSpec(layers=1, kv_heads=1, head_dim=6, value_dim=4, shared_kv=True)
    with pytest.raises(CompressionError, match="no heads to choose for"):
        CompressedStore(latent, "knorm")


# ---- what is kept


@pytest.mark.parametrize(
    "scorer", ["snapkv:window=4", "knorm", "keydiff", "tova", "h2o:recent=0.5"]
)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("budget", [1, 3, 0.5, 1.0, 1000])
def test_a_prompt_keeps_what_the_scorer_says(scorer, tokens, budget) -> None:
    what = Compression(find_scorer(scorer), budget, every=0)
    store = CompressedStore(SPEC, what)
    k, v, q = drawn(tokens)
    seq = store.open()
    (out,) = fed(store, seq, k, v, q, [tokens])
    keep = min(max(1, int(tokens * budget) if isinstance(budget, float) else budget), tokens)
    bound = torch.arange(1, tokens + 1)
    for layer in range(SPEC.layers):
        view = LayerView(*(x[layer].transpose(0, 1)[None] for x in (k, v, q)))
        score = find_scorer(scorer).score(view, keep)[0]
        want = keep_best(score, torch.full((2,), keep))
        assert places(store, seq, layer) == [own.tolist() for own in want]
        whole, _ = attention_reference(
            q[layer],
            k[layer],
            v[layer],
            torch.zeros(tokens, dtype=torch.int64),
            bound,
            6**-0.5,
            0.0,
        )
        torch.testing.assert_close(out[layer], whole, rtol=1e-12, atol=1e-12)
    store.check_integrity()


@pytest.mark.parametrize(
    ("scorer", "every"),
    [("tova", 1), ("tova", 3), ("h2o:recent=0.25", 2), ("streaming:sinks=2", 1)],
)
def test_decoding_evicts_as_a_loop_by_hand_does(scorer, every) -> None:
    """The policy written out: lists of kept tokens, a sum of attention, and an argsort at each cadence."""
    keep, prompt, new = 6, 9, 11
    store = CompressedStore(SPEC, Compression(find_scorer(scorer), keep, every=every))
    k, v, q = drawn(prompt + new)
    seq = store.open()
    fed(store, seq, k, v, q, [prompt, *[1] * new])
    for layer in range(SPEC.layers):
        kept = [list(range(prompt)) for _ in range(2)]
        mass = torch.zeros(2, prompt + new, dtype=torch.float64)
        for now in range(prompt + new):
            if now >= prompt:
                kept = [[*own, now] for own in kept]
            rows = []
            for head in range(2):
                seen = [t for t in kept[head] if t <= now]
                logits = q[layer, now, 2 * head : 2 * head + 2] @ k[layer, seen, head].T * 6**-0.5
                weight = logits.softmax(-1).mean(0)
                mass[head, seen] += weight
                rows.append(weight)
            due = now == prompt - 1 or (now >= prompt and (now - prompt + 1) % every == 0)
            if not due:
                continue
            for head in range(2):
                own = kept[head]
                if scorer.startswith("h2o"):
                    score, sure = mass[head, own].clone(), int(keep * 0.25)
                    score[len(own) - sure :] = torch.inf
                elif scorer == "tova":
                    score = torch.stack(rows).mean(0)
                    score[-1] = torch.inf
                else:
                    score = torch.arange(len(own), dtype=torch.float64)
                    score[:2] = torch.inf
                best = score.sort(descending=True, stable=True).indices[:keep].sort().values
                kept[head] = [own[i] for i in best]
        assert places(store, seq, layer) == kept
    store.check_integrity()


def test_forks_share_pages_until_they_write() -> None:
    store = CompressedStore(SPEC, "knorm:budget=10")
    k, v, q = drawn(40)
    seq = store.open()
    fed(store, seq, k, v, q, [30])
    held = store.pool.pool.held_pages
    twin = store.fork(seq)
    assert store.pool.pool.held_pages == held
    before = store.attend(seq, 0, q[0, :1])[0]
    fed(store, twin, k, v, q, [1, 1])
    assert torch.equal(store.attend(seq, 0, q[0, :1])[0], before), (
        "the other's page was copied first"
    )
    store.check_integrity()
    a, b = store.reorder([seq, twin], [1, 1])
    assert a is twin
    assert places(store, a, 1) == places(store, b, 1)
    store.check_integrity()
    store.close([a, b])
    assert store.report()["held_bytes"] == 0


def test_aborts_give_everything_back() -> None:
    store = CompressedStore(SPEC, "knorm:budget=4")
    k, v, q = drawn(40)
    seq = store.open()
    step = store.reserve([seq], [20])
    store.append(step, 0, k[0, :20], v[0, :20])
    store.attend(seq, 0, q[0, :20], step=step)
    with pytest.raises(StepError, match="layer 1 is not written"):
        store.commit(step)
    store.abort(step)
    assert store.report()["held_bytes"] == 0
    fed(store, seq, k, v, q, [20, 1])
    was = [places(store, seq, layer) for layer in range(2)]
    step = store.reserve([seq], [1])
    store.append(step, 0, k[0, :1], v[0, :1])
    store.abort(step)
    assert [places(store, seq, layer) for layer in range(2)] == was
    step = store.reserve([seq], [5])
    store.append(step, 0, k[0, :5], v[0, :5])
    store.attend(seq, 0, q[0, :5], step=step)
    store.abort(step)
    with pytest.raises(StepError, match="close it and begin again"):
        store.reserve([seq], [1])
    store.close(seq)
    store.check_integrity()


def test_a_full_pool_says_so_and_loses_nothing() -> None:
    page = SPEC.bytes_per_page // 4
    store = CompressedStore(SPEC, "knorm:budget=8", device_bytes=8 * page)
    k, v, q = drawn(40)
    seq = store.open()
    fed(store, seq, k, v, q, [30])
    other = store.open()
    with pytest.raises(PoolExhausted):
        fed(store, other, k, v, q, [30])
    store.close([other, seq])
    assert store.report()["held_bytes"] == 0
    store.check_integrity()


def test_the_newest_stay_under_a_threshold() -> None:
    store = CompressedStore(SPEC, "knorm:budget=1.0,rule=(threshold:tau=0.0,window=3)")
    k, v, q = drawn(20)
    seq = store.open()
    fed(store, seq, k, v, q, [20])
    assert places(store, seq, 0) == [[17, 18, 19]] * 2, "no key has a negative norm"


# ---- texts that prompts share


def prompted(store: CompressedStore, ids: list[int], more: int = 0, tenant: str | None = None):
    """Open with ids and feed what is not kept yet; keys depend on the ids alone."""
    gen = torch.Generator().manual_seed(9)
    table = torch.randn(3, SPEC.layers, 50, 4, 6, dtype=torch.float64, generator=gen)
    seq = store.open(ids, tenant)
    found, rest = seq.cached_tokens, torch.tensor(ids[seq.cached_tokens :])
    k, v, q = (x[:, rest] for x in table)
    step, out = store.reserve([seq], [len(rest)]), torch.empty(0)
    for layer in range(SPEC.layers):
        store.append(step, layer, k[layer, :, :2], v[layer, :, :2])
        out = store.attend(seq, layer, q[layer], step=step)[0]
    store.commit(step)
    return seq, found, out


def test_scorers_of_keys_share_what_they_kept() -> None:
    store = CompressedStore(SPEC, "keydiff:budget=0.4")
    text, question = list(range(30)), [40, 41, 3, 7]
    assert not store.private
    first, found, _ = prompted(store, text)
    assert found == 0
    held = store.pool.pool.held_pages
    second, found, out = prompted(store, [*text, *question])
    assert found == 30
    assert store.report()["prefixes"] == 2
    by_fork = store.fork(first)
    assert places(store, by_fork, 0) == places(store, first, 0)
    fresh = CompressedStore(SPEC, "keydiff:budget=0.4")
    other, _, _ = prompted(fresh, text)
    _, found, want = prompted(fresh, [*text, *question])
    assert found == 30
    assert torch.equal(out, want)
    for tenant, ids in (("b", [*text, 1]), (None, [*text[:-1], 31, 1]), (None, text)):
        assert prompted(store, ids, tenant=tenant)[1] == 0, (
            "another tenant, another text, nothing left"
        )
    store.check_integrity()
    assert other.kept.sum() < 30 * 4
    store.close(list(store._sequences.values()))
    assert store.pool.pool.held_pages >= held, "kept for later prompts"
    assert store.evict() > 0
    assert store.report()["held_bytes"] == 0
    assert second.closed


def test_scorers_of_queries_do_not_share() -> None:
    store = CompressedStore(SPEC, "snapkv:budget=0.4")
    assert store.private
    for _ in range(2):
        assert prompted(store, list(range(30)))[1] == 0
    assert prompted(store, list(range(31)))[1] == 0
    assert store.report()["prefixes"] == 0


def test_shared_texts_make_room() -> None:
    page = SPEC.bytes_per_page // 4
    store = CompressedStore(SPEC, "keydiff:budget=8", device_bytes=24 * page)
    for start in range(8):
        seq, _, _ = prompted(store, [start, *range(20)])
        store.close(seq)
    store.check_integrity()
    assert 0 < store.report()["prefixes"] < 8


def test_what_is_coded_is_part_of_the_key() -> None:
    said = [
        CompressedStore(SPEC, scorer, codec=codec)._identity
        for scorer, codec in (("knorm", None), ("knorm:budget=0.5", None), ("knorm", "zstd"))
    ]
    assert len(set(said)) == 3
