"""Who holds which tokens, and what they see: arithmetic against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.parallel import Plan
from plait.parallel.context import visible
from plait.parallel.context.order import SequenceOrder, cut_evenly
from plait.parallel.context.ulysses import key_heads
from plait.parallel.context.visible import Visible, stretches


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 4))
def test_every_token_has_one_rank_and_restore_undoes_take(
    length: int, ring: int, ulysses: int
) -> None:
    order = SequenceOrder(length, ring, ulysses)
    held = [order.index(rank) for rank in range(order.ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert [len(h) for h in held] == list(order.counts)
    x = torch.randn(2, length, 3)
    parts = [order.take(x, r)[:, : order.counts[r]] for r in range(order.ranks)]
    assert torch.equal(order.restore(torch.cat(parts, 1)), x)
    assert all(order.take(x, r).shape[1] == order.rows(r) >= 1 for r in range(order.ranks))


def test_places_of_the_ring_are_balanced() -> None:
    order = SequenceOrder(1003, ring=4)
    work = [int((order.place_index(p) + 1).sum()) for p in range(4)]  # keys that a causal row sees
    assert max(work) / min(work) < 1.02
    assert max(order.counts) - min(order.counts) <= 2
    contiguous = [sum(range(a + 1, b + 1)) for a, b in cut_evenly((0, 1003), 4)]
    assert max(contiguous) / min(contiguous) > 6


def test_key_heads_are_those_that_the_query_heads_read() -> None:
    for heads, kv_heads, ranks in ((8, 8, 4), (8, 4, 2), (8, 2, 4), (12, 6, 3), (16, 2, 8)):
        sent = key_heads(heads, kv_heads, ranks)
        assert sent is not None
        each, share = len(sent) // ranks, heads // ranks
        for head in range(heads):
            rank, local = divmod(head, share)
            assert sent[rank * each + local * each // share] == head * kv_heads // heads
    assert key_heads(12, 4, 6) is None


def sees(rows: Tensor, keys: Tensor) -> Tensor:
    """A window, documents of 90 tokens, and padding in the second sequence of the batch."""
    seen = (keys[None, :] <= rows[:, None]) & (rows[:, None] - keys[None, :] < 70)
    seen = seen & (rows[:, None] // 90 == keys[None, :] // 90)
    padding = torch.stack([keys >= 0, keys < 150])[:, None, None]
    return seen[None, None] & padding


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_tiles_are_the_mask(ring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible, "TILE", 16)
    order = SequenceOrder(211, ring)
    places = [order.place_index(p) for p in range(ring)]
    for rows in places:
        seen = Visible(rows, places, sees)
        for source, keys in enumerate(places):
            found = torch.zeros(2, 1, len(rows), len(keys), dtype=torch.bool)
            for r, k, mask in seen.tiles(source):
                assert not found[:, :, r, k].any(), "a tile comes twice"
                found[:, :, r, k] = True if mask is None else mask
                assert mask is None or (mask.any() and not mask.all())
            assert torch.equal(found, sees(rows, keys))


def test_tiles_do_not_straddle_chunks() -> None:
    order = SequenceOrder(4001, ring=2)
    places = order.place_index(0)
    assert all(bool((torch.diff(places[s]) == 1).all()) for s in stretches(places))
    striped = torch.arange(4000)[(torch.arange(4000) // 16) % 2 == 0]
    assert len(stretches(striped)) == -(-len(striped) // visible.TILE)


@pytest.mark.parametrize("text", ["cp4:ring", "cp4:ring,ulysses=2", "cp8:ulysses"])
def test_plans_go_round(text: str) -> None:
    plan = Plan.parse(text)
    assert Plan.parse(str(plan)) == plan == Plan.from_json(plan.to_json())
    assert str(plan) == text
    assert plan.cp.ulysses == {"cp4:ring": 1, "cp4:ring,ulysses=2": 2, "cp8:ulysses": 8}[text]
