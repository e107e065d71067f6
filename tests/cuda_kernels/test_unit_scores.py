"""Summaries of keys and dot products with them, against plain torch and against the keys themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.cuda_kernels import summarise, unit_scores
from plait.cuda_kernels.page_summary import summarise_reference
from plait.cuda_kernels.unit_scores import unit_scores_reference

PAGE, HEADS, WIDTH = 4, 2, 8


def pool(dtype: torch.dtype, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Keys of 12 pages, and the 7 of one sequence in their order."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(12, PAGE, HEADS, width, generator=rng, dtype=torch.float64).to(dtype)
    return keys, torch.randperm(12, generator=rng)[:7].int()


def room(dtype: torch.dtype) -> Tensor:
    return torch.full((33, HEADS, WIDTH), 777.0, dtype=dtype)


@given(
    unit=st.integers(1, 9), shift=st.integers(0, 5), seed=st.integers(0, 9), sums=st.booleans(),
    cuts=st.lists(st.integers(0, 28), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_pieces_give_what_one_pass_gives(unit, shift, seed, sums, cuts, dtype) -> None:
    keys, pages = pool(dtype, seed)
    kind = torch.promote_types(dtype, torch.float32) if sums else dtype
    ours, whole = ([room(kind), None if sums else room(kind)] for _ in range(2))
    edges = [0, *sorted(cuts), 28]
    for first, stop in itertools.pairwise(edges):
        summarise(keys, pages, first, stop, unit, *ours, shift=shift)
    summarise_reference(keys, pages, 0, 28, unit, shift, *whole)
    rows = keys[pages.long()].flatten(0, 1)
    # A unit that began before the first token keeps what stood there: it is not of these tokens.
    first = -(-shift // unit)
    for got, want in zip(ours, whole, strict=True):
        if got is not None:
            torch.testing.assert_close(got[first:], want[first:], rtol=1e-6, atol=1e-6)
    if not sums and shift == 0:
        units = [rows[u : u + unit] for u in range(0, 28, unit)]
        assert torch.equal(ours[0][: len(units)], torch.stack([u.amin(0) for u in units]))
        assert torch.equal(ours[1][: len(units)], torch.stack([u.amax(0) for u in units]))


def test_nan_stays() -> None:
    keys, pages = pool(torch.float32)
    keys[pages[1].long(), 2] = torch.nan
    low, high = room(torch.float32), room(torch.float32)
    summarise(keys, pages, 0, 28, 3, low, high)
    assert low[2].isnan().all()  # tokens 6, 7 and 8
    assert high[2].isnan().all()
    assert low[:2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("queries", [1, 4, 7])
@pytest.mark.parametrize("width", [WIDTH, 32])
def test_scores_are_dot_products(dtype, queries, width, monkeypatch) -> None:
    keys, pages = pool(dtype, width=width)
    work = torch.promote_types(dtype, torch.float32)
    q, other = torch.randn(2, HEADS, queries, width, dtype=work)
    for count in (0, 1, 27):
        got = unit_scores(q, keys, pages, count)
        torch.testing.assert_close(got, unit_scores_reference(q, keys, pages, count))
    both = unit_scores(q, keys, pages, 27, other, keys.neg())
    want = unit_scores_reference(q - other, keys, pages, 27)
    torch.testing.assert_close(both, want, rtol=1e-5, atol=1e-5)
    import sys

    monkeypatch.setattr(sys.modules["plait.cuda_kernels.unit_scores"], "MIN_SHARE_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(unit_scores(q, keys, pages, 27, other, keys.neg()), both)


def test_bad_shapes_are_refused() -> None:
    keys, pages = pool(torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        unit_scores(torch.zeros(3, 1, WIDTH), keys, pages, 4)
    with pytest.raises(ValueError, match="29 units of 7 pages"):
        unit_scores(torch.zeros(HEADS, 1, WIDTH), keys, pages, 29)
    with pytest.raises(ValueError, match="do not fit"):
        summarise(keys, pages, 0, 4, 4, room(torch.bfloat16), room(torch.bfloat16))
    with pytest.raises(ValueError, match="do not lie in 33 units of 1"):
        summarise(keys, pages, 0, 28, 1, room(torch.float32), room(torch.float32), shift=6)


def test_operators_check_out() -> None:
    keys, pages = pool(torch.float32)
    q = torch.randn(HEADS, 2, WIDTH)
    torch.library.opcheck(torch.ops.plait.unit_scores.default, (q, keys, pages, 9, None, None))
    low, high = room(torch.float32), room(torch.float32)
    torch.library.opcheck(torch.ops.plait.summarise.default, (keys, pages, 0, 28, 3, 0, low, high))
