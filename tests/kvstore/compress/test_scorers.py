"""Scorers against kvpress, against brute force, and their invariances."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from plait.kvstore.compress import LayerView, Rotary, find_budget, find_scorer, keep_best
from plait.kvstore.compress.budgets import Ada, Pyramid, Threshold, Uniform
from plait.kvstore.compress.budgets.budget import shares
from plait.kvstore.compress.registry import BUDGETS, SCORERS
from plait.kvstore.compress.scorers import (
    H2O,
    Critical,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LagKV,
    QueryMeans,
    Scorer,
    SnapKV,
    Streaming,
    Tova,
    TriAttention,
)
from plait.kvstore.compress.view import attention_columns, attention_rows

KEEP = 30
LIKE_KVPRESS: dict[str, Scorer] = {
    "snapkv": SnapKV(window=16),
    "tova": Tova(),
    "knorm": Knorm(),
    "keydiff": KeyDiff(),
    "lagkv": LagKV(lag=32),
    "streaming": Streaming(),
    "expected": ExpectedAttention(),
    "expected_mean": ExpectedAttention(covariance=False, norm=False),
    "critical": Critical(base=SnapKV(window=16)),
}


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("kvpress_scores.safetensors"))


BY_ITSELF = sorted(name for name, kind in SCORERS.items() if not kind.waits)  # right after a prompt


def view_of(saved: dict[str, Tensor], layer: int) -> LayerView:
    k, v, q, output = (saved[f"{layer}.{name}"] for name in ("k", "v", "q", "output"))
    rotary = Rotary(saved["frequencies"])
    return LayerView(k, v, q, torch.arange(k.shape[2]), layer, 2, rotary, output)


def random_view(tokens: int = 40, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> LayerView:
    random = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, kv_heads, tokens, 8, generator=random, dtype=torch.float64)
    q = torch.randn(2, heads, tokens, 8, generator=random, dtype=torch.float64)
    output = torch.randn(12, heads * 8, generator=random, dtype=torch.float64)
    rotary = Rotary(10000.0 ** -(torch.arange(4) / 4))
    return LayerView(k, v, q, torch.arange(tokens), 0, 1, rotary, output)


def small(name: str) -> Scorer:
    return {"snapkv": SnapKV(window=8), "lagkv": LagKV(lag=8)}.get(name) or SCORERS[name]()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", LIKE_KVPRESS)
def test_scores_and_kept_tokens_are_kvpress(
    saved: dict[str, Tensor], name: str, layer: int
) -> None:
    theirs = saved[f"{layer}.score.{name}"].double()
    ours = LIKE_KVPRESS[name].score(view_of(saved, layer), KEEP).double()
    free = ours.isfinite()
    if name != "streaming":  # theirs is 0 or 1 there
        torch.testing.assert_close(ours[free], theirs[free], rtol=1e-5, atol=1e-7)
    for row in range(2):
        kept = keep_best(ours[row], torch.full((2,), KEEP))
        want = theirs[row].sort(dim=-1, descending=True, stable=True).indices[:, :KEEP]
        assert torch.equal(torch.stack(kept), want.sort().values)


@pytest.mark.parametrize("layer", [0, 1])
def test_rules_keep_what_kvpress_keeps(saved: dict[str, Tensor], layer: int) -> None:
    """AdaKV's heads compete for a layer's tokens; a threshold keeps what is worth it."""
    view = view_of(saved, layer)
    for name, scorer, rule in (
        ("ada", SnapKV(window=16), Ada()),
        ("threshold", KeyDiff(), Threshold(tau=-0.55, window=10)),
    ):
        scores, want = scorer.score(view, KEEP), saved[f"{layer}.kept.{name}"]
        for row, own in zip(scores, want, strict=True):
            own_scores = row.clone()
            own_scores[:, len(own_scores[0]) - rule.newest :] = float("inf") if rule.newest else 0
            kept = keep_best(own_scores, rule.allot(own_scores, KEEP, layer, 2))
            found = torch.zeros_like(own)
            for head, tokens in enumerate(kept):
                found[head, tokens] = 1
            assert torch.equal(found, own), name
            assert own.sum(1).unique().numel() > 1, "heads keep different numbers"


def test_the_pyramid_is_kvpress_but_for_what_rounding_loses(saved: dict[str, Tensor]) -> None:
    theirs = saved["pyramid"].long()
    score = torch.zeros(1, 120)
    ours = torch.cat(
        [Pyramid(window=0).allot(score, KEEP, n, len(theirs)) for n in range(len(theirs))]
    )
    assert (ours - theirs).abs().max() <= 1
    assert int(ours.sum()) == KEEP * len(theirs)


def test_columns_are_the_sum_of_all_rows(saved: dict[str, Tensor]) -> None:
    view = view_of(saved, 0)
    assert view.q is not None
    visible = torch.arange(view.tokens, 0, -1)
    mean = attention_columns(view, view.q).mean(2) / visible
    torch.testing.assert_close(mean, saved["0.score.observed"], rtol=1e-5, atol=1e-7)


def test_columns_in_runs_are_columns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    view = random_view()
    assert view.q is not None
    whole = attention_rows(view, view.q).sum(3)
    monkeypatch.setattr("plait.kvstore.compress.view.SCORE_ELEMENTS", 2 * 4 * 40 * 7)
    torch.testing.assert_close(attention_columns(view, view.q), whole, rtol=1e-12, atol=1e-13)


def test_h2o_is_the_sum_and_the_newest() -> None:
    view = random_view()
    assert view.q is not None
    score = H2O(recent=0.4).score(view, 10)
    assert score[..., -4:].isinf().all()
    assert score[..., :-4].isfinite().all()
    want = attention_rows(view, view.q).sum(3).mean(2)
    torch.testing.assert_close(score[..., :-4], want[..., :-4], rtol=1e-12, atol=1e-13)


def test_triattention_is_its_formula_term_by_term() -> None:
    view = random_view(tokens=9)
    assert view.q is not None
    assert view.rotary is not None
    assert view.positions is not None
    means = QueryMeans.of(view.q, view.positions, view.rotary)
    score = TriAttention(means=(means,), recent=0).score(view, 4)
    half, frequencies = 4, view.rotary.frequencies.double()
    plain = view.rotary.undo(view.k, view.positions)
    want = torch.zeros(2, 4, 9, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for t in range(9):
                for f in range(half):
                    kf = complex(plain[b, h // 2, t, f], plain[b, h // 2, t, half + f])
                    m, a = complex(means.mean[h, f]), float(means.size[h, f])
                    turns = [9 - t + 2**i for i in range(17)]
                    angle = frequencies[f] * torch.tensor(turns, dtype=torch.float64)
                    toward = (m * kf.conjugate() * torch.exp(1j * angle)).real.mean()
                    want[b, h, t] += toward + (a - abs(m)) * abs(kf)
    want = (want - want.mean(-1, keepdim=True)) / want.std(-1, keepdim=True)
    want = want.unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(score, want, rtol=1e-9, atol=1e-10)


@given(
    tokens=st.integers(2, 30), name=st.sampled_from(BY_ITSELF), dtype=st.sampled_from(["16", "32", "64"])
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_short_texts_and_every_dtype_give_finite_scores_of_the_right_shape(
    tokens: int, name: str, dtype: str
) -> None:
    to = {"16": torch.bfloat16, "32": torch.float32, "64": torch.float64}[dtype]
    view = random_view(tokens)
    view = replace(view, k=view.k.to(to), v=view.v.to(to), q=None if view.q is None else view.q.to(to))  # fmt: skip
    score = small(name).score(view, max(1, tokens // 2))
    assert score.shape == (2, 2, tokens)
    assert score.dtype in (torch.float32, torch.float64)
    assert not score.isnan().any()
    assert not (score == -torch.inf).any()


@pytest.mark.parametrize("name", sorted(set(BY_ITSELF) - {"tova"}))
def test_heads_and_rows_are_scored_apart(name: str) -> None:
    view = random_view()
    assert view.q is not None
    score = small(name).score(view, 20)
    swapped = replace(
        view,
        k=view.k.flip(0, 1),
        v=view.v.flip(0, 1),
        q=view.q.flip(0).roll(2, 1),
        output=None if view.output is None else view.output.roll(16, 1),
    )
    torch.testing.assert_close(small(name).score(swapped, 20).flip(0, 1), score)


def test_a_query_that_was_not_kept_is_asked_for_by_name() -> None:
    view = replace(random_view(), q=None)
    with pytest.raises(ValueError, match="snapkv scores by the last 40 queries and 0 were kept"):
        SnapKV().score(view, 40)


def test_nan_is_an_error_not_an_order() -> None:
    score = torch.zeros(1, 4)
    score[0, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        keep_best(score, torch.tensor([2]))


def test_of_equal_scores_the_first_is_kept() -> None:
    assert keep_best(torch.zeros(1, 9), torch.tensor([3]))[0].tolist() == [0, 1, 2]


# ---- budgets


@given(
    wishes=st.lists(st.floats(0, 50), min_size=1, max_size=9),
    total=st.integers(0, 200),
    most=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_shares_sum_to_the_total_and_stay_within_bounds(
    wishes: list[float], total: int, most: int
) -> None:
    got = shares(torch.tensor(wishes, dtype=torch.float64), total, most)
    assert int(got.sum()) == min(total, most * len(wishes))
    assert got.min() >= 0
    assert got.max() <= most


@given(
    tokens=st.integers(1, 60),
    keep=st.integers(0, 80),
    layers=st.integers(1, 7),
    rule=st.sampled_from([Uniform(), Pyramid(window=4), Pyramid(window=4, beta=2), Ada(), Ada(floor=0)]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_budget_is_spent_to_the_token(tokens: int, keep: int, layers: int, rule: Uniform) -> None:
    scores = torch.rand(layers, 3, tokens, generator=torch.Generator().manual_seed(tokens))
    counts = torch.stack([rule.allot(scores[n], keep, n, layers) for n in range(layers)])
    assert int(counts.sum()) == layers * 3 * min(keep, tokens)
    assert counts.min() >= 0
    assert counts.max() <= tokens


def test_pyramid_slopes_down_and_ada_goes_where_scores_are() -> None:
    line = [int(Pyramid(window=4).allot(torch.zeros(1, 200), 50, n, 5)[0]) for n in range(5)]
    assert line == sorted(line, reverse=True)
    assert line[0] > line[-1]
    score = torch.stack([torch.arange(20.0), torch.zeros(20)])
    assert Ada(floor=0.25).allot(score, 8, 0, 1).tolist() == [14, 2]
    assert Ada(floor=1.0).allot(score, 8, 0, 1).tolist() == [8, 8]


def test_threshold_keeps_what_is_worth_it_and_the_newest() -> None:
    score = torch.tensor([[0.0, 5, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert Threshold(tau=1, window=2).allot(score, 1, 0, 1).tolist() == [3, 2]


# ---- names


def test_text_forms_come_back() -> None:
    for text in (
        "snapkv",
        "snapkv:window=32,kernel=7",
        "expected:future=64,covariance=False",
        "h2o:recent=0.25",
        "critical:base=(snapkv:window=32,kernel=7),first=0.25",
        "critical:base=(critical:base=(snapkv:window=8,kernel=3),first=0.25),first=0.75",
    ):
        assert str(find_scorer(text)) == text
        assert find_scorer(str(find_scorer(text))) == find_scorer(text)
    for name in BUDGETS:
        assert str(find_budget(name)) == name
    assert find_budget("ada:floor=0.5") == Ada(floor=0.5)
    assert find_scorer("critical:base=knorm") == Critical(base=Knorm())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snap", "there is no scorer 'snap'; there are critical, expected"),
        ("snapkv:windw=3", "no such option as 'windw'; it has window, kernel, pool"),
        ("snapkv:window=x", "window='x' is not int"),
        ("snapkv:kernel=4", "kernel odd"),
        ("h2o:recent=2", "use 0 to 1"),
        ("expected:norm=maybe", "is not bool"),
    ],
)
def test_wrong_names_say_what_there_is(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_scorer(text)
