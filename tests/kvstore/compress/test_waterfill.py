"""Water-filling: the budget is spent to the last step, as brute force would, and the store holds what it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kvstore import CompressedStore, KVSpec
from plait.kvstore.compress import Compression, CompressionError
from plait.kvstore.compress.budgets import Ada, WaterFill, Widths
from plait.kvstore.compress.budgets.waterfill import fill
from plait.kvstore.compress.tiers import Tiers

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=32, page_tokens=8)


def spent(level: torch.Tensor, widths: Widths) -> int:
    return int(torch.tensor((0, *widths.costs))[level].sum())


def distortion(level: torch.Tensor, weights: torch.Tensor, widths: Widths) -> float:
    bits = 8 * torch.tensor((0, *widths.costs), dtype=torch.float64)[level] / widths.elements
    return float((weights.double() * 4.0**-bits).sum())


def best(weights: torch.Tensor, total: int, widths: Widths) -> float:
    """The least distortion of all ways to spend no more than the total."""
    ways = torch.tensor(list(itertools.product(range(len(widths.costs) + 1), repeat=len(weights))))
    costs = torch.tensor((0, *widths.costs))[ways]
    lost = (weights.double() * 4.0 ** -(8 * costs.double() / widths.elements)).sum(1)
    return float(lost[costs.sum(1) <= total].min())


@given(
    weights=st.lists(st.floats(0, 50), min_size=1, max_size=6),
    total=st.integers(0, 20),
    step=st.integers(1, 3),
    steps=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_equal_steps_are_spent_as_brute_force_does(weights, total, step, steps) -> None:
    widths = Widths(tuple(step * (i + 1) for i in range(steps)), 8, step * steps)
    tokens = torch.tensor(weights)
    level = fill(tokens, total, widths)
    assert distortion(level, tokens, widths) == pytest.approx(
        best(tokens, total, widths), rel=1e-9, abs=1e-12
    )
    assert spent(level, widths) == min(total // step, steps * len(weights)) * step


@given(
    weights=st.lists(st.floats(0, 50), min_size=1, max_size=5),
    total=st.integers(0, 60),
    costs=st.lists(st.integers(1, 16), min_size=1, max_size=3, unique=True).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_unequal_steps_leave_nothing_affordable_and_miss_at_most_a_step(
    weights, total, costs
) -> None:
    widths = Widths(tuple(costs), 8, costs[-1])
    tokens = torch.tensor(weights)
    level = fill(tokens, total, widths)
    left = total - spent(level, widths)
    assert left >= 0
    dear = torch.tensor((0, *costs)).diff()
    assert all(left < int(dear[own]) for own in level.tolist() if own < len(costs))
    ranked = tokens.sort(descending=True, stable=True).indices
    assert (level[ranked].diff() <= 1).all(), "a heavier token is at most a step below"
    worst = distortion(torch.zeros_like(level), tokens, widths) / len(tokens)
    assert distortion(level, tokens, widths) <= best(tokens, total, widths) + max(
        worst, float(tokens.max())
    )


def test_bits_are_the_formula() -> None:
    """With a width for every bit, ``max(0, log2(w / theta) / 2)`` rounded, for one theta."""
    weights = torch.randn(400, generator=torch.Generator().manual_seed(0)).exp().square()
    widths = Widths(tuple(range(1, 17)), 8, 16)
    level = fill(weights, 900, widths)
    assert spent(level, widths) == 900
    ideal = 0.5 * weights.double().log2()
    offset = ideal - level
    some = level > 0
    assert float(offset[some].max() - offset[some].min()) <= 1.0 + 1e-9
    assert float(ideal[~some].max()) <= float(offset[some].min()) + 1.0


def test_without_widths_it_is_ada_without_a_floor_on_the_distortion() -> None:
    score = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    assert (
        WaterFill().allot(score, 11, 0, 1).tolist() == Ada(floor=0).allot(score, 11, 0, 1).tolist()
    )
    values = torch.tensor([[2.0, 0], [0, 0], [1, 1]])
    weights = WaterFill().weigh(torch.tensor([1.0, 3, torch.inf]), values)
    assert weights.tolist() == [2.0, 0.0, torch.inf]


def fed(store, tokens: int):
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, tokens, 2, 32, generator=gen) for _ in range(2))
    q = torch.randn(2, tokens, 4, 32, generator=gen)
    seq = store.open()
    step = store.reserve([seq], [tokens])
    for layer in range(2):
        store.append(step, layer, k[layer], v[layer])
        store.attend(seq, layer, q[layer], step=step)
    store.commit(step)
    return seq


@pytest.mark.parametrize("codec", ["none|int8|int4|int2", "int4|int2", "int8"])
def test_the_budget_counts_bytes(codec) -> None:
    """A quarter of the bytes holds more than a quarter of the tokens; only tails and broken pages come on top."""
    tokens, budget = 800, 0.25
    store = CompressedStore(
        SPEC, f"snapkv:window=8,budget={budget},rule=waterfill", codec=Tiers.parse(codec, tail=8)
    )
    seq = fed(store, tokens)
    page = SPEC.page_tokens * 2 * 32 * 4
    over = (codec.count("|") + 2) * page * 2 * 2
    held = store.report()["held_bytes"] - 5 * int(seq.kept.sum())  # places stand beside
    assert held <= budget * tokens * SPEC.bytes_per_token + over
    assert seq.kept.sum() > 1.5 * budget * tokens * 4
    store.check_integrity()
    plain = CompressedStore(SPEC, f"snapkv:window=8,budget={budget},rule=waterfill")
    assert fed(plain, tokens).kept.sum(1).tolist() == [int(budget * tokens) * 2] * 2


def test_a_fork_codes_on_and_streams() -> None:
    store = CompressedStore(SPEC, "snapkv:window=8,budget=0.3,rule=waterfill", codec="none|int4")
    seq = fed(store, 300)
    twin = store.fork(seq)
    assert (twin.kept == seq.kept).all()
    store.close([seq, twin])
    assert store.report()["held_bytes"] == 0


@pytest.mark.parametrize(
    ("scorer", "codec", "said"),
    [
        ("knorm:rule=waterfill", None, "does not score by attention"),
        ("expected:rule=waterfill", None, "use snapkv, h2o, kvzip or expected:norm=False"),
        ("tova:rule=waterfill", None, "same tokens in all heads"),
        ("snapkv", "none|int8|int4", "says no shares"),
        ("snapkv:rule=waterfill", "none@0.2|int8", "leave out the shares"),
        ("snapkv:rule=waterfill", "none|int4|int8", "widest first"),
        ("snapkv:rule=waterfill", "int8|int4@0.5|int2", "each with @share but the last"),
    ],
)
def test_what_does_not_go_with_it_is_refused(scorer, codec, said) -> None:
    with pytest.raises(ValueError, match=said):
        CompressedStore(SPEC, scorer, codec=codec)
    assert Compression.parse("expected:norm=False,rule=waterfill").rule == WaterFill()
    assert issubclass(CompressionError, ValueError)
