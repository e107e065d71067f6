"""Selectors: the papers' index sets, bounds that hold, full budgets, and what stale or shuffled choices do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import selector_references as paper
from plait.kvstore.select import KeyView, Selection, Selector, find_selector
from plait.kvstore.select.hylra import missed_mass, plan_layers
from plait.kvstore.select.layers import Layers
from plait.kvstore.select.registry import SELECTORS
from plait.kvstore.select.rocket import Rocket, split
from plait.kvstore.select.rocket_mt import RocketMT
from plait.kvstore.select.summaries import Summaries

PAGE, HEADS, GROUP, WIDTH = 4, 2, 3, 8


def view_of(tokens: int = 61, seed: int = 0, layer: int = 5, layers: int = 8, **given) -> KeyView:
    rng = torch.Generator().manual_seed(seed)
    pages = -(-tokens // PAGE)
    keys = torch.randn(pages + 3, PAGE, HEADS, WIDTH, dtype=torch.float64, generator=rng)
    own = torch.randperm(pages + 3, generator=rng)[:pages].int()
    return KeyView(keys, own, tokens, layer, layers, WIDTH**-0.5, **given)


def query(seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS * GROUP, WIDTH, dtype=torch.float64, generator=rng) * 2


def in_order(view: KeyView) -> Tensor:
    """Shape: `[tokens, kv_heads, head_dim]`"""
    return view.keys[view.pages.long()].flatten(0, 1)[: view.tokens]


def per_head(view: KeyView, q: Tensor, choose) -> list[list[int]]:
    keys, rows = in_order(view), q.unflatten(0, (HEADS, GROUP))
    return [choose(rows[head], keys[:, head]) for head in range(HEADS)]


PAPERS = {
    "exact:budget=9": lambda q, k: paper.exact(q, k, 9),
    "quest:budget=20,page=5": lambda q, k: paper.quest(q, k, 5, 4),
    "sparq:budget=14,channels=3,window=2": lambda q, k: paper.sparq(q, k, 3, 2, 14),
    "rocket:budget=16,chunk=3,channels=5": lambda q, k: paper.rocket(q, k, 3, 5, 8),
    "rocket:budget=16": lambda q, k: paper.rocket(q, k, 2, 4, 8),
    "top-p:share=0.7,pages=0.8,page=4": lambda q, k: paper.top_p(q, k, 4, 0.8, 0.7),
}


@pytest.mark.parametrize("text", PAPERS)
@pytest.mark.parametrize("tokens", [61, 64])
def test_index_sets_are_the_papers(text, tokens) -> None:
    for seed in range(4):
        view, q = view_of(tokens, seed), query(seed)
        chosen = find_selector(text).plan(q, view)
        assert chosen is not None
        assert [own.tolist() for own in chosen.lists()] == per_head(view, q, PAPERS[text])
        assert chosen.indices.dtype == torch.int32


def test_delta_reads_what_its_leader_chose() -> None:
    selector = find_selector("delta:full=0+4,budget=24,newest=2,page=4")
    view, q = view_of(), query()
    with pytest.raises(RuntimeError, match="layer 5 reads what layer 4 chose"):
        selector.plan(q, view)
    assert selector.plan(q, replace(view, layer=4)) is None, "the leader reads everything"
    found = selector.plan(query(9), view)
    assert found is not None
    want = paper.delta(q.unflatten(0, (HEADS, GROUP)), in_order(view), 4, 2, 6)
    assert [own.tolist() for own in found.lists()] == [want] * HEADS
    with pytest.raises(RuntimeError, match="has not run in this step"):
        selector.plan(q, replace(view, tokens=60))


def test_hylra_reads_what_its_leader_found() -> None:
    selector = find_selector("hylra:full=0+4,budget=9")
    view, q = view_of(), query()
    assert selector.plan(q, replace(view, layer=4)) is None
    found = selector.plan(query(9), view)
    assert found is not None
    want = per_head(view, q, lambda q, k: paper.exact(q, k, 9))
    assert [own.tolist() for own in found.lists()] == want


# ---- what holds for all of them


BUDGETED = {
    "exact": "", "quest": "dense=0,page=2", "sparq": "channels=4,window=1", "rocket": "",
    "rocket-mt": "", "hylra": "full=0+4", "delta": "full=0+4,page=2,newest=1",
}  # fmt: skip


def asked(text: str, q: Tensor, view: KeyView) -> Selection | None:
    """Plan, the leader of layer 5 first."""
    selector = find_selector(text)
    if selector.across_layers:
        selector.plan(q, replace(view, layer=4))
    return selector.plan(q, view)


@pytest.mark.parametrize("name", BUDGETED)
def test_a_full_budget_reads_everything(name) -> None:
    for budget in (1, 61, 1000):
        assert asked(f"{name}:budget={budget},{BUDGETED[name]}", query(), view_of()) is None
    assert asked(f"{name}:budget=0.3,{BUDGETED[name]}", query(), view_of()) is not None


@pytest.mark.parametrize("name", BUDGETED)
def test_lists_are_ascending_distinct_and_within(name) -> None:
    for budget, tokens in itertools.product((2, 0.2, 0.9), (7, 33, 61)):
        view = view_of(tokens)
        chosen = asked(f"{name}:budget={budget},{BUDGETED[name]}", query(), view)
        if chosen is None:
            continue
        for own in chosen.lists():
            assert len(own) > 0
            assert (own[1:] > own[:-1]).all()
            assert own[0] >= 0
            assert own[-1] * chosen.unit < tokens


@pytest.mark.parametrize("name", BUDGETED)
def test_ranks_share_a_budget_of_tokens(name) -> None:
    one = asked(f"{name}:budget=12,{BUDGETED[name]}", query(), view_of())
    two = asked(f"{name}:budget=24,{BUDGETED[name]}", query(), view_of(shards=2))
    assert one is not None
    assert two is not None
    assert torch.equal(one.indices, two.indices)


@pytest.mark.parametrize("name", BUDGETED)
def test_growing_is_as_being_there_at_once(name) -> None:
    """Summaries and hints are carried from step to step, and change nothing."""
    text = f"{name}:budget=12,{BUDGETED[name]}"
    text += ",chunk=3,channels=5" if "rocket" in name else ""
    whole = view_of()
    for tokens in range(30, 62):
        step = replace(whole, tokens=tokens)
        grown = asked(text, query(tokens), step)
        fresh = asked(text, query(tokens), replace(step, memory={}))
        assert grown is not None
        assert fresh is not None
        assert torch.equal(grown.indices, fresh.indices)


@pytest.mark.parametrize("name", ["exact", "quest", "sparq", "rocket"])
def test_heads_are_chosen_for_apart(name) -> None:
    """KV heads in another order give the lists in another order: nothing leaks from head to head."""
    view, q = view_of(), query()
    text = f"{name}:budget=12,{BUDGETED[name]}"
    straight = asked(text, q, view)
    turned = asked(
        text, q.unflatten(0, (HEADS, GROUP)).flip(0).flatten(0, 1),
        replace(view, keys=view.keys.flip(2).contiguous(), memory={}),
    )  # fmt: skip
    assert straight is not None
    assert turned is not None
    for a, b in zip(straight.lists(), reversed(turned.lists()), strict=True):
        assert torch.equal(a, b)


def captured(chosen: Selection | None, q: Tensor, view: KeyView) -> float:
    """Attention mass of what is read, the mean over heads."""
    weights = (view.logits(view.grouped(q)) * view.scale).softmax(-1)
    if chosen is None:
        return 1.0
    inside = torch.arange(chosen.unit)
    mass = 0.0
    for head, own in enumerate(chosen.lists()):
        tokens = (own.long()[:, None] * chosen.unit + inside).flatten()
        mass += float(weights[head][:, tokens[tokens < view.tokens]].sum(-1).mean()) / HEADS
    return mass


@given(seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_the_oracle_captures_the_most_and_more_with_more(seed) -> None:
    view, q = view_of(seed=seed), query(seed)
    masses = [captured(asked(f"exact:budget={b}", q, view), q, view) for b in (2, 8, 16, 30, 60)]
    assert masses == sorted(masses)
    for name, options in BUDGETED.items():
        chosen = asked(f"{name}:budget=16,{options}", q, replace(view, memory={}))
        assert chosen is not None
        tokens = max(len(own) for own in chosen.lists()) * chosen.unit
        allowed = captured(asked(f"exact:budget={tokens}", q, view), q, view)
        assert captured(chosen, q, view) <= allowed + 1e-9


@given(seed=st.integers(0, 50), share=st.floats(0.05, 0.99))
@settings(max_examples=15, deadline=None)
def test_top_p_holds_its_share(seed, share) -> None:
    view, q = view_of(seed=seed), query(seed)
    chosen = find_selector(f"top-p:share={share},pages=0.999999999,page=1").plan(q, view)
    assert captured(chosen, q, view) >= share - 1e-6


# ---- Quest's bound, and RocketKV's, which is none


@given(seed=st.integers(0, 200), page=st.integers(1, 9), spread=st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_no_key_gives_more_than_its_pages_bound(seed, page, spread) -> None:
    view, q = view_of(seed=seed), view_of(seed=seed).grouped(query(seed) * spread)
    bounds = Summaries(view, page).extend(view).bounds(q)
    logits = view.logits(q)
    for unit in range(bounds.shape[-1]):
        most = logits[:, :, unit * page : (unit + 1) * page].amax(-1)
        assert (bounds[:, :, unit] >= most - 1e-9 * spread).all()


def test_stale_summaries_break_the_bound() -> None:
    view, q = view_of(), view_of().grouped(query())
    held = Summaries(view, 4).extend(view)
    view.keys.mul_(3)  # the keys of the pages are others now
    assert (held.bounds(q).amax() < view.logits(q).amax()).all()


def test_some_channels_do_not_bound() -> None:
    """Documented of RocketKV: with r < d the estimate can be less than what a key gives."""
    view = view_of()
    view.keys[...] = 0
    slot = view.pages[3].long()
    view.keys[slot, 1, :, 7] = 100.0  # only seen in a channel that is not looked at
    q = torch.ones(HEADS * GROUP, WIDTH, dtype=torch.float64)
    q[:, 7] = 0.9
    chosen = Rocket(budget=8, chunk=2, channels=3).plan(q, view)
    assert chosen is not None
    assert all(13 not in own.tolist() for own in chosen.lists())
    whole = Rocket(budget=8, chunk=2, channels=8).plan(q, replace(view, memory={}))
    assert whole is not None
    assert all(13 in own.tolist() for own in whole.lists())


def test_the_worked_example_of_rocketkv() -> None:
    found = split(tokens=131_072, budget=256, new=0, head_dim=128)
    assert (found.kept, found.chunk, found.channels, found.read) == (1296, 3, 75, 128)
    assert split(131_072, 256, 64, 128).prompt == 1296 - 64
    assert split(200, 256, 0, 128) == (200, 200, 1, 128, 128)
    assert split(131_072, 256, 1000, 128).kept == 2000, "twice what is generated at least"


# ---- RocketKV for several turns: a filter of the prompt, then the second stage over what passed


def filtered(q: Tensor, k: Tensor, rows: Tensor, count: int) -> list[int]:
    """SnapKV's votes as RocketKV has them: q `[queries, group, d]` of the last tokens, k `[tokens, d]`."""
    queries, tokens = len(rows), len(k)
    votes = torch.zeros(tokens - queries, dtype=torch.float64)
    for i, row in enumerate(rows):
        seen = k[: tokens - queries + i + 1]
        weights = (row @ seen.T / k.shape[-1] ** 0.5).softmax(-1)
        votes += weights.sum(0)[: len(votes)]
    pooled = [votes[max(0, t - 31) : t + 32].max() for t in range(len(votes))]
    kept = paper.best(torch.stack(pooled), count - queries)
    return kept + list(range(tokens - queries, tokens))


@pytest.mark.parametrize("queries", [32, 2])
def test_a_prompt_filters_and_decoded_tokens_join(queries) -> None:
    selector = RocketMT(budget=40)
    view = view_of(300)
    seen = replace(view, tokens=290)
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(queries, HEADS * GROUP, WIDTH, dtype=torch.float64, generator=rng) * 2
    count = split(290, 40, 0, WIDTH).kept
    assert 40 < count < 290
    selector.prompt(rows, seen)
    keys = in_order(view)
    q = query(5)
    for tokens in (291, 297, 300):
        chosen = selector.plan(q, replace(view, tokens=tokens))
        assert chosen is not None
        chunk, channels = view.own["stage"]
        for head, own in enumerate(chosen.lists()):
            mine = rows.unflatten(1, (HEADS, GROUP))[:, head]
            kept = filtered(q, keys[:290, head], mine, count) + list(range(290, tokens))
            few = paper.rocket(
                q.unflatten(0, (HEADS, GROUP))[head], keys[kept, head], chunk, channels, 20
            )
            assert own.tolist() == [kept[i] for i in few]
    again = selector.plan(q, replace(view, memory={}))
    plain = Rocket(budget=40).plan(q, replace(view, memory={}))
    assert again is not None
    assert plain is not None
    assert torch.equal(again.indices, plain.indices), "without a prompt nothing is filtered"


# ---- HyLRA's plan against all plans


def cost_of(full: tuple[int, ...], missed: Tensor, c_full, c_read, weight, most) -> float:
    cost, leader = 0.0, 0
    for layer in range(len(missed)):
        if layer in full:
            leader = layer
            cost += weight * c_full
        else:
            lost = float(missed[layer, leader])
            cost += weight * c_read + (lost if lost <= most else float("inf"))
    return cost


@given(
    layers=st.integers(1, 9), seed=st.integers(0, 999), weight=st.floats(0, 3),
    most=st.floats(0.2, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_layer_plan_is_the_cheapest_there_is(layers, seed, weight, most) -> None:
    missed = torch.rand(layers, layers, generator=torch.Generator().manual_seed(seed)).double()
    missed.fill_diagonal_(0)
    found = plan_layers(missed, 1.0, 0.1, weight, most)
    every = itertools.chain.from_iterable(
        itertools.combinations(range(1, layers), n) for n in range(layers)
    )
    cheapest = min(cost_of((0, *some), missed, 1.0, 0.1, weight, most) for some in every)
    assert cost_of(found, missed, 1.0, 0.1, weight, most) == pytest.approx(cheapest, abs=1e-9)


def test_a_profile_says_what_is_missed() -> None:
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(5, HEADS, GROUP, 40, generator=rng).mul(3).softmax(-1)
    other = torch.randn(5, HEADS, GROUP, 40, generator=rng).mul(3).softmax(-1)
    missed = missed_mass([first, first, other], 10)
    assert missed[1, 0] == missed[0, 0]
    assert missed[2, 0] > missed[2, 2] + 0.1
    assert missed[0, 2] == 0
    assert plan_layers(missed, 1.0, 0.1, 0.3) == (0, 2)


# ---- bad input


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("quest:budget=0", "must be a share in"),
        ("quest:budget=-3", "must be a share in"),
        ("exact:budget=nan", "must be a share in"),
        ("quest:page=0", "page must be at least 1"),
        ("quest:reduce=mean", "reduce sum or max"),
        ("sparq:channels=0", "channels and window"),
        ("rocket:chunk=-1", "chunk and channels"),
        ("delta:full=1+2", "begin with layer 0"),
        ("delta:full=x", "is not Layers"),
        ("hylra:full=2", "begin with layer 0"),
        ("top-p:share=1.5", r"are in \(0, 1\]"),
        ("top-k", "there is no selector 'top-k'"),
    ],
)
def test_bad_options_are_refused(text, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        find_selector(text)


@pytest.mark.parametrize("name", SELECTORS)
def test_text_reads_back(name) -> None:
    made: Selector = SELECTORS[name]()
    assert find_selector(str(made)) == made
    assert str(Layers([3, 0, 3])) == "0+3"


@pytest.mark.parametrize("name", ["quest", "exact", "rocket", "sparq"])
def test_odd_widths_and_single_heads(name) -> None:
    rng = torch.Generator().manual_seed(0)
    keys = torch.randn(9, 5, 1, 7, generator=rng).bfloat16()
    view = KeyView(keys, torch.arange(9, dtype=torch.int32), 44, 3, 4, 1.0)
    q = torch.randn(1, 7, generator=rng).bfloat16()
    chosen = asked(f"{name}:budget=0.25,{BUDGETED[name]}", q, view)
    assert chosen is not None
    assert len(chosen.lists()) == 1
