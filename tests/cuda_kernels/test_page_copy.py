"""Copies of pages and of new tokens, against plain indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.cuda_kernels import Regions, copy_pages, write_tokens

DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).flatten(len(shape) - 1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter_are_indexing(dtype) -> None:
    """Pages of three regions of two widths go into rows that hold them all, and come back elsewhere."""
    regions = [numbers(9, 4, 2, width, dtype=dtype) for width in (3, 3, 5)]
    room = numbers(7, 4 * 2 * 11 + 6, dtype=dtype)
    before, parts, at = room.clone(), [], 3
    for region in regions:
        size = region[0].numel()
        parts.append(room[:, at : at + size].unflatten(1, region.shape[1:]))
        at += size
    rows, pages = np.array([6, 0, 3]), np.array([1, 8, 1])
    copy_pages(Regions(parts), rows, Regions(regions), pages)
    for part, region in zip(parts, regions, strict=True):
        assert torch.equal(bits(part[rows]), bits(region[pages]))
    untouched = torch.ones_like(room, dtype=torch.bool)
    untouched[rows, 3:at] = False
    assert torch.equal(bits(room[untouched]), bits(before[untouched])), "nothing else was written"
    new = [region.clone() for region in regions]
    copy_pages(Regions(new), np.array([2, 5]), Regions(parts), np.array([6, 0]))
    for region, copy in zip(regions, new, strict=True):
        want = bits(region).clone()
        want[[2, 5]] = bits(region)[[1, 8]]
        assert torch.equal(bits(copy), want)


def test_pages_are_copied_within_their_regions() -> None:
    region = torch.arange(24.0).reshape(6, 2, 2)
    want = region[[0, 1, 2, 1, 0, 5]]
    both = Regions([region])
    copy_pages(both, np.array([4, 3], np.int32), both, np.array([0, 1], np.int32))
    assert torch.equal(region, want)
    copy_pages(both, np.empty(0, np.int64), both, np.empty(0, np.int64))
    copy_pages(Regions([]), np.empty(0, np.int64), Regions([]), np.empty(0, np.int64))


@pytest.mark.parametrize(
    ("message", "to", "of"),
    [
        ("do not fit", [torch.zeros(3, 4)], [torch.zeros(3, 5)]),
        ("do not fit", [torch.zeros(3, 4)], [torch.zeros(3, 4, dtype=torch.int32)]),
        ("do not fit", [torch.zeros(3, 4)], [torch.zeros(3, 4)] * 2),
        ("must be in", [torch.zeros(3, 4)], [torch.zeros(2, 4)]),
        ("must be in", [torch.zeros(2, 4)], [torch.zeros(3, 4)]),
    ],
)
def test_what_does_not_fit_is_refused(message, to, of) -> None:
    with pytest.raises(ValueError, match=message):
        copy_pages(Regions(to), np.array([2]), Regions(of), np.array([2]))


def test_bad_pages_and_regions_are_refused() -> None:
    one = Regions([torch.zeros(3, 4)])
    for pages in (np.array([-1]), np.array([3])):
        with pytest.raises(ValueError, match=r"in \[0, 3\)"):
            copy_pages(one, pages, one, np.array([0]))
    with pytest.raises(ValueError, match="two equal rows"):
        copy_pages(one, np.array([1, 2]), one, np.array([0]))
    with pytest.raises(ValueError, match="not contiguous"):
        Regions([torch.zeros(3, 4, 5).transpose(1, 2)])
    with pytest.raises(ValueError, match="one device"):
        Regions([torch.zeros(3, 4), torch.zeros(3, 4, device="meta")])


LAYOUTS = {
    "dense": lambda x: x,
    "heads first, as transformers has them": lambda x: (
        x.transpose(0, 1).contiguous().transpose(0, 1)
    ),
    "a part of wider rows": lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],
    "every other token": lambda x: torch.stack([x, x], 1)[:, 0],
    "one row for all tokens": lambda x: x[:1].expand(x.shape),
    "last dim not dense": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_written_where_they_belong(layout, dtype, heads) -> None:
    for slots in ([5], [4, 5, 6, 7, 8], [19, 0, 3, 4, 5, 1], []):
        region = numbers(5, 4, heads, 6, dtype=dtype)
        rows = numbers(len(slots), heads, 6, dtype=dtype)
        if rows.numel():
            rows = LAYOUTS[layout](rows)
        want = bits(region).view(20, -1).clone()
        want[slots] = bits(rows).reshape(len(slots), -1) if slots else want[slots]
        write_tokens(region, np.array(slots, np.int64), rows)
        assert torch.equal(bits(region).view(20, -1), want)


def test_the_operators_are_sound_for_torch() -> None:
    """Schemas say what is written, and tracing sees it."""
    to, of = [torch.zeros(3, 2, 2) for _ in range(2)], [torch.randn(4, 2, 2) for _ in range(2)]
    pages = torch.tensor([2, 0]), torch.tensor([1, 3])
    torch.library.opcheck(torch.ops.plait.copy_pages, (to, pages[0], of, pages[1]))
    region, rows = torch.zeros(3, 2, 1, 2), torch.randn(2, 1, 2)
    torch.library.opcheck(torch.ops.plait.write_tokens, (region, torch.tensor([5, 0]), rows))
    torch.ops.plait.copy_pages(to, pages[0], of, pages[1])
    assert torch.equal(to[1][2], of[1][1])


def test_devices_without_a_kernel_take_the_same_path_through_torch() -> None:
    to, of = (
        Regions([torch.zeros(3, 2, device="meta")]),
        Regions([torch.zeros(3, 2, device="meta")]),
    )
    assert not to.direct
    copy_pages(to, np.array([1]), of, np.array([2]))
    write_tokens(
        torch.zeros(3, 2, 1, 2, device="meta"), np.array([1]), torch.zeros(1, 1, 2, device="meta")
    )
