"""Cuts: whatever is cut can be joined again, and every element is somewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.collectives.primitive import chunk_sizes
from plait.parallel.attention.heads import kv_cut, query_cut, stacked_cut
from plait.parallel.layout import Cut

PROPERTY = settings(max_examples=100, deadline=None)


@st.composite
def cuts(draw: Any) -> Cut:
    """Cuts of every kind the library makes."""
    dim = draw(st.integers(0, 1))
    ranks = draw(st.integers(1, 8))
    order = draw(st.permutations(range(ranks)))
    kind = draw(st.sampled_from(["chunks", "query", "kv", "stacked"]))
    width = draw(st.integers(1, 3))
    if kind == "chunks":
        parts = draw(st.integers(1, 3))
        return Cut.chunks(dim, parts * draw(st.integers(0, 30)), order, parts)
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if ranks % n == 0 or n % ranks == 0]))
    heads = kv_heads * draw(st.integers(1, 3)) * ranks
    if kind == "query":
        return query_cut(heads, width, ranks, order, dim)
    return (kv_cut if kind == "kv" else stacked_cut)(heads, kv_heads, width, ranks, order)


def whole_of(cut: Cut) -> torch.Tensor:
    shape = [3, 3]
    shape[cut.dim] = cut.length
    return torch.arange(float(shape[0] * shape[1])).view(shape)


@PROPERTY
@given(cuts())
def test_join_is_the_inverse_of_take(cut: Cut) -> None:
    whole = whole_of(cut)
    parts = [cut.take(whole, r) for r in range(len(cut.runs))]
    assert torch.equal(cut.join(parts), whole)
    for rank, part in enumerate(parts):
        assert tuple(part.shape) == cut.local_shape(whole.shape, rank)
        assert part.shape[cut.dim] == cut.extent(rank)
        assert (
            part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
            or not part.numel()
        )


@PROPERTY
@given(cuts())
def test_read_asks_only_for_own_slices(cut: Cut) -> None:
    whole = whole_of(cut)
    for rank in range(len(cut.runs)):
        asked = []

        def read(start: int, stop: int, asked: list[tuple[int, int]] = asked) -> torch.Tensor:
            asked.append((start, stop))
            return whole.narrow(cut.dim, start, stop - start)

        assert torch.equal(cut.read(read, rank), cut.take(whole, rank))
        assert asked == list(cut.runs[rank])


@PROPERTY
@given(cuts())
def test_offsets_find_what_a_rank_holds(cut: Cut) -> None:
    whole = whole_of(cut)
    for rank, runs in enumerate(cut.runs):
        part = cut.take(whole, rank)
        for start, stop in runs:
            if start < stop:
                offset = cut.offset_of(rank, start, stop)
                assert offset is not None
                there = part.narrow(cut.dim, offset, stop - start)
                assert torch.equal(there, whole.narrow(cut.dim, start, stop - start))
        assert cut.offset_of(rank, cut.length, cut.length + 1) is None


@PROPERTY
@given(cuts())
def test_shared_runs_are_those_that_others_hold_too(cut: Cut) -> None:
    """Element by element: who else holds it."""
    positions = torch.arange(cut.length)
    flat = Cut(0, cut.length, cut.runs)
    held = [flat.take(positions, r).tolist() for r in range(len(cut.runs))]
    for rank, own in enumerate(held):
        expected = [
            tuple(r for r, theirs in enumerate(held) if element in theirs) for element in own
        ]
        found: list[tuple[int, ...]] = [(rank,)] * len(own)
        for holders, parts in cut.shared(rank).items():
            for start, stop in parts:
                found[start:stop] = [holders] * (stop - start)
        assert found == expected


def test_chunks_are_torchs() -> None:
    for length in range(40):
        for ranks in range(1, 9):
            expected = [len(c) for c in torch.arange(length).chunk(ranks)]
            assert [n for n in chunk_sizes(length, ranks) if n] == [n for n in expected if n]
            assert sum(chunk_sizes(length, ranks)) == length


@pytest.mark.parametrize(
    "runs", [(((0, 3),), ((4, 6),)), (((0, 4),), ((3, 6),)), (((0, 3),), ((3, 5),)), (((1, 6),),)]
)
def test_a_cut_with_holes_or_overlaps_is_refused(runs: Any) -> None:
    with pytest.raises(ValueError, match="must cover"):
        Cut(0, 6, runs)


def test_unequal_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="equal parts"):
        Cut.chunks(0, 7, [0, 1], parts=2)
