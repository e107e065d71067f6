"""The CUDA kernels of pages, simulated: copies, tokens' rows and summaries, beside indexing; and what must be seen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cuda_kernels import Regions
from plait.cuda_kernels.gpu.pieces import piece_bytes
from plait.cuda_kernels.page_copy import copy_pages_reference
from plait.cuda_kernels.page_copy_gpu import (
    copy_page_pieces,
    copy_pages_launch,
    write_token_rows,
    write_tokens_launch,
)
from plait.cuda_kernels.page_summary import summarise_reference
from plait.cuda_kernels.page_summary_gpu import serves, summarise_launch


def numbers(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=g)
    return bits.view(dtype).flatten(len(shape) - 1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def copy_simulated(to: list, to_pages: list, of: list, of_pages: list, part_bytes=1 << 16) -> int:
    """Copy with the CUDA kernel; return the bytes of a piece."""
    a, b = Regions(to), Regions(of)
    size = piece_bytes([*a.table.flat, *b.table.flat])
    tables = torch.from_numpy(a.table), torch.from_numpy(b.table)
    pages = torch.tensor(to_pages), torch.tensor(of_pages)
    most = int(a.table[:, 2].max())
    variant, grid, args = copy_pages_launch(*tables, *pages, size, most)
    small = copy_page_pieces(size=size, threads=32)
    parts = -(-most // part_bytes)
    small.simulate((grid[0], grid[1], parts), *args[:-1], parts)
    assert variant.kernel is small.kernel
    return size


@pytest.mark.parametrize(
    ("width", "pad", "size"), [(64, 16, 16), (72, 8, 8), (68, 4, 4), (66, 2, 2), (65, 0, 1)]
)
@pytest.mark.parametrize("part_bytes", [1 << 16, 100])
def test_pages_of_any_alignment(width: int, pad: int, size: int, part_bytes: int) -> None:
    """Two regions of a row that holds them both, from and to regions of their own."""
    regions = [numbers(5, 2, width), numbers(6, 3, width)]
    rows = numbers(4, 5 * width + pad + 16)
    second = rows[:, 16 : 16 + 5 * width]
    parts = [second[:, : 2 * width].view(4, 2, width), second[:, 2 * width :].view(4, 3, width)]
    want = [rows.clone() for _ in parts]
    views = [w[:, 16 : 16 + 5 * width] for w in want]
    copy_pages_reference(
        [views[0][:, : 2 * width].view(4, 2, width), views[0][:, 2 * width :].view(4, 3, width)],
        torch.tensor([3, 0]), regions, torch.tensor([4, 1]),
    )  # fmt: skip
    assert copy_simulated(parts, [3, 0], regions, [4, 1], part_bytes) == size
    assert torch.equal(rows, want[0]), "what was copied, and nothing else"
    back = [torch.zeros_like(r) for r in regions]
    copy_simulated(back, [2, 0], parts, [0, 3])
    assert torch.equal(back[1][2], regions[1][1])
    assert torch.equal(back[0][0], regions[0][4])


def test_a_wrong_step_of_the_table_is_seen() -> None:
    region, to = numbers(4, 64), torch.zeros(3, 80, dtype=torch.uint8)
    a, b = Regions([to[:, :64]]), Regions([region])
    pages = torch.tensor([2]), torch.tensor([3])
    for step, same in ((80, True), (64, False)):
        a.table[0, 1] = step
        tables = torch.from_numpy(a.table), torch.from_numpy(b.table)
        variant, grid, args = copy_pages_launch(*tables, *pages, 16, 64)
        to.zero_()
        copy_page_pieces(size=16, threads=32).simulate(grid, *args)
        assert torch.equal(to[2, :64], region[3]) is same
        assert variant.threads == 256


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 3), width=st.integers(1, 40), extra=st.integers(0, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]),
)  # fmt: skip
def test_tokens_are_written_where_they_belong(heads, width, extra, dtype) -> None:
    slots = torch.tensor([7, 0, 3])
    region = numbers(2, 4, heads, width, dtype=dtype)
    rows = numbers(3, heads + extra, width + extra, dtype=dtype)[:, :heads, :width]
    want = bits(region).view(8, -1).clone()
    want[slots] = bits(rows).view(3, -1)
    variant, grid, args = write_tokens_launch(region, slots, rows)
    variant.simulate(grid, *args)
    assert torch.equal(bits(region).view(8, -1), want)
    same = write_token_rows(**variant.constants)
    assert same is variant


def summarised(keys, pages, first, stop, unit, shift, low, high, launch=summarise_launch):
    """Summarise with the CUDA kernel."""
    assert serves(keys, low, high)
    held = pages.int()
    variant, grid, args = launch(keys, held, first, stop, unit, shift, low, high)
    variant.simulate(grid, *args)


def drawn(dtype: torch.dtype, ranges: bool, units: int, pieces: int = 3):
    g = torch.Generator().manual_seed(units)
    width = pieces * 16 // dtype.itemsize
    keys = torch.randn(7, 8, 1, width, generator=g).to(dtype)
    keys[1, 3] = math.nan
    keys[4, 0, 0, :2] = torch.tensor([math.inf, -math.inf])
    sums = torch.float32 if not ranges else dtype
    low = torch.full((units, 1, width), 5.0, dtype=sums)
    return keys, torch.tensor([6, 0, 4, 1, 5]), low, torch.full_like(low, -5.0) if ranges else None


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(), unit=st.integers(1, 12), ranges=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)  # fmt: skip
def test_summaries_of_any_tokens(data, unit, ranges, dtype) -> None:
    shift = data.draw(st.integers(0, unit - 1))
    keys, pages, low, high = drawn(dtype, ranges, -(-(40 + shift) // unit))
    first = data.draw(st.integers(0, 39))
    cut, stop = sorted(data.draw(st.tuples(st.integers(first, 40), st.integers(first, 40))))
    want, want_high = low.clone(), None if high is None else high.clone()
    for a, b in ((first, cut), (cut, stop)):
        summarise_reference(keys, pages, a, b, unit, shift, want, want_high)
        if a < b:
            summarised(keys, pages, a, b, unit, shift, low, high)
    coarse = 0 if ranges else 1e-5
    torch.testing.assert_close(low, want, rtol=coarse, atol=coarse, equal_nan=True)
    if high is not None:
        torch.testing.assert_close(high, want_high, rtol=0, atol=0, equal_nan=True)


def test_mutations_of_a_summary_are_seen() -> None:
    def stale(*args):
        """Take every unit for one that was begun before."""
        variant, grid, found = summarise_launch(*args)
        return variant, grid, (*found[:4], found[4] + 1, *found[5:])

    def one_page(keys, pages, *rest):
        return summarise_launch(keys, none, *rest)

    none = torch.zeros(5, dtype=torch.int32)
    keys, pages, low, high = drawn(torch.float32, True, 5)
    keys.nan_to_num_(0, 3, -3)
    want, want_high = low.clone(), high.clone()
    summarise_reference(keys, pages, 0, 40, 8, 0, want, want_high)
    summarised(keys, pages, 0, 40, 8, 0, low, high)
    assert torch.equal(low, want)
    for launch in (stale, one_page):
        low.fill_(5.0)
        summarised(keys, pages, 0, 40, 8, 0, low, high, launch)
        assert not torch.equal(low, want)
