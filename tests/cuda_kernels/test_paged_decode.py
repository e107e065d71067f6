"""Paged decode attention on CUDA, simulated: ragged rows and lengths, windows, splits, soft cap; and mutations."""

from __future__ import annotations

import math

import pytest
import torch

from mutated import mutated
from plait.cuda_kernels import decode_choice, merge_states, paged_decode
from plait.cuda_kernels.paged_attention import paged_attention_reference


def drawn(group: int, kv_heads: int, page_tokens: int):
    """Three sequences: several rows with windows, one row, and rows of which one sees nothing."""
    g = torch.Generator().manual_seed(group)
    lengths, rows = [37, 5, 70], [2, 1, 4]
    pages = [-(-n // page_tokens) for n in lengths]
    q_indptr = torch.tensor([0, *torch.tensor(rows).cumsum(0)])
    kv_indptr = torch.tensor([0, *torch.tensor(pages).cumsum(0)], dtype=torch.int32)
    indices = torch.randperm(sum(pages) + 2, generator=g)[: sum(pages)].int()
    k, v = (
        torch.randn(sum(pages) + 2, page_tokens, kv_heads, 64, generator=g).bfloat16()
        for _ in range(2)
    )
    for s, (n, count) in enumerate(zip(lengths, pages, strict=True)):  # rubbish behind the end
        last = indices[kv_indptr[s] + count - 1]
        k[last, n - (count - 1) * page_tokens :] = math.nan
        v[last, n - (count - 1) * page_tokens :] = math.nan
    q = torch.randn(sum(rows), group * kv_heads, 64, generator=g).bfloat16()
    lo = torch.tensor([0, 30, 0, 0, 60, 2, 70])
    hi = torch.tensor([36, 37, 5, 66, 67, 68, 70])
    return q, k, v, [q_indptr, kv_indptr, indices, lo, hi]


def check(module, group=4, kv_heads=2, page_tokens=16, splits=2, cap=0.0, sinks=None) -> None:
    q, k, v, integers = drawn(group, kv_heads, page_tokens)
    words = [t.int() for t in integers]
    variant, grid, args, o, lse = module.decode_launch(q, k, v, words, 0.125, cap, splits)
    o.fill_(math.nan)
    variant.simulate(grid, *args)
    got, got_lse = merge_states(o, lse, sinks)
    wide = (t.nan_to_num().double() for t in (q, k, v))
    want, want_lse = paged_attention_reference(*wide, *integers, 0.125, cap)
    if sinks is not None:  # once, whatever the splits
        alone, want_lse = want_lse, torch.logaddexp(want_lse, sinks.double())
        want = want * torch.exp(alone - want_lse).unsqueeze(-1)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"group": 16, "kv_heads": 1, "splits": 1, "cap": 4.0},  # 64 rows of one head
        {
            "group": 1,
            "kv_heads": 2,
            "page_tokens": 4,
            "splits": 4,
            "sinks": torch.tensor([0.5, -2.0]),
        },
    ],
)
def test_decode_is_the_reference(case) -> None:
    check(paged_decode, **case)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("t >= first[half] and ", "", id="no-window"),
        pytest.param("p0, p1, p2, p3, b0, b1", "p0, p1, p2, p3, b1, b0", id="tokens-swapped"),
        pytest.param("acc[4 * i + 2 * half] *= keep", "pass", id="not-rescaled"),
    ],
)
def test_a_mutated_decode_fails(old: str, new: str) -> None:
    changed = mutated(paged_decode, old, new)
    with pytest.raises(AssertionError):
        check(changed, kv_heads=1)


def test_what_is_served_and_in_how_many_splits() -> None:
    q, k, v, _ = drawn(4, 2, 16)
    assert decode_choice.served(q, k, v, 64)
    assert not decode_choice.served(q.float(), k, v, 64)
    assert not decode_choice.served(q, k, v, 32)
    assert not decode_choice.served(q, k[:, :12].contiguous(), v[:, :12].contiguous(), 64)
    assert decode_choice.splits_of(1, 8, 1 << 17, 132) == 16
    assert decode_choice.splits_of(64, 8, 1 << 17, 132) == 1
    assert decode_choice.splits_of(1, 8, 600, 132) == 2
