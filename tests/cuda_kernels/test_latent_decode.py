"""Paged decode of MLA's latents on CUDA, simulated: many heads, ragged rows, windows, splits; and mutations."""

from __future__ import annotations

import math

import pytest
import torch

from mutated import mutated
from plait.cuda_kernels import latent_decode, merge_states
from plait.cuda_kernels.paged_attention import paged_attention_reference

PAGE, WIDTH, VALUE = 16, 288, 256


def check(module, heads=5, splits=1, cap=0.0) -> None:
    """Two sequences: two rows, one with a window; and one row of few tokens beside one that sees nothing."""
    g = torch.Generator().manual_seed(heads)
    k = torch.randn(4, PAGE, 1, WIDTH, generator=g).bfloat16()
    k[1, 5:] = math.nan  # rubbish behind the end of the first sequence
    integers = [
        torch.tensor([0, 2, 4]), torch.tensor([0, 2, 4]), torch.tensor([2, 1, 3, 0]),
        torch.tensor([0, 9, 0, 7]), torch.tensor([20, 21, 18, 7]),
    ]  # fmt: skip
    q = torch.randn(4, heads, WIDTH, generator=g).bfloat16()
    assert latent_decode.served_latent(q, k, k, VALUE)
    words = [t.int() for t in integers]
    variant, grid, args, o, lse = module.latent_launch(q, k, VALUE, words, 0.06, cap, splits)
    o.fill_(math.nan)
    variant.simulate(grid, *args)
    got, got_lse = merge_states(o, lse)
    wide = [t.nan_to_num().double() for t in (q, k, k)]
    want, want_lse = paged_attention_reference(*wide, *integers, 0.06, cap, value_dim=VALUE)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("heads", "splits", "cap"), [(5, 2, 0.0), (16, 1, 4.0)])
def test_latents_are_the_reference(heads: int, splits: int, cap: float) -> None:
    check(latent_decode, heads, splits, cap)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("t >= first[half] and ", "", id="no-window"),
        pytest.param("if chunk < i32(chunks):", "if chunk >= i32(0):", id="dims-counted-twice"),
        pytest.param("ptx.barrier()  # all parts are there", "pass", id="scores-not-waited-for"),
        pytest.param("+ u64(u32(warp)) * u64(128 * sets)", "", id="each-warp-the-same-dims"),
    ],
)
def test_a_mutated_decode_fails(old: str, new: str) -> None:
    changed = mutated(latent_decode, old, new)
    with pytest.raises(AssertionError):
        check(changed, heads=3)


def test_what_is_served() -> None:
    q, k = torch.zeros(1, 3, WIDTH).bfloat16(), torch.zeros(2, PAGE, 1, WIDTH).bfloat16()
    assert latent_decode.served_latent(q, k, k, VALUE)
    assert not latent_decode.served_latent(q, k, k.clone(), VALUE)  # V of its own
    assert not latent_decode.served_latent(q, k, k, 128)
    assert not latent_decode.served_latent(q.float(), k, k, VALUE)
