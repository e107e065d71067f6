"""The CUDA kernel of top-k, simulated with little room: rows that break guesses, ties, places; and mutations of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mutated import mutated
from plait.cuda_kernels import top_k_gpu
from plait.cuda_kernels.gpu import radix
from plait.cuda_kernels.gpu.simulator import SimulationError
from plait.cuda_kernels.top_k import top_k_reference

SMALL = {"room": 192, "sample": 64, "threads": 32}
N, K = 900, 40
LONG = 32 * 192 + 700  # beyond one window of places


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simulated(x: Tensor, k: int, hint: Tensor | None = None, module=top_k_gpu, seed=None) -> Tensor:
    size = x.numel() // x.shape[-1] * k
    room = torch.full((size + x.numel(),), -7)  # a mutated kernel may write more
    variant, grid, args = module.top_k_launch(x, k, hint, room, **SMALL)
    variant.simulate(grid, *args, seed=seed)
    return torch.cat([room[:size], room[size:][room[size:] != -7]]).view(*x.shape[:-1], -1)


def normal(n: int = N) -> Tensor:
    return torch.randn(n, generator=rng())


def lowest_hint() -> tuple[Tensor, Tensor]:
    x = normal()
    return x, x.argsort()[:K]


def ties_at_the_top() -> tuple[Tensor, Tensor]:
    x = normal().clamp(max=0.0)
    return x, torch.randperm(N, generator=rng())[:K]


def few_valid_hints() -> tuple[Tensor, Tensor]:
    hint = torch.full((K,), -1)
    hint[:3] = torch.tensor([N, 5, 2**40])
    x = torch.zeros(N)
    x[500 : 500 + K] = 1.0
    return x, hint


def log_normal() -> tuple[Tensor, Tensor]:
    return (4 * normal()).exp(), torch.randperm(N, generator=rng(1))[:K]


def many_ties_over_windows() -> tuple[Tensor, Tensor]:
    x = torch.zeros(LONG)
    x[3::130] = 1.0  # 53 of them, 13 too many
    return x, torch.arange(K)


def greatest_over_windows() -> tuple[Tensor, Tensor]:
    x = normal(LONG)
    x[-1], x[0], x[32 * 192], x[32 * 192 - 1] = 9.0, 9.0, 9.0, 9.0
    return x, torch.arange(0, LONG, 50)


def nan_and_infinity() -> tuple[Tensor, Tensor]:
    x = normal()
    x[::70], x[1::7], x[2::9], x[3::9] = torch.nan, torch.inf, -torch.inf, -0.0
    return x, torch.arange(0, 7 * K, 7)


def all_nan() -> tuple[Tensor, Tensor]:
    return torch.full((N,), torch.nan), torch.arange(K)


def subnormal() -> tuple[Tensor, Tensor]:
    return normal() * 1e-39, torch.arange(K)


def hidden_from_the_sample() -> tuple[Tensor, Tensor]:
    """All lie in one of the sample's runs: only the hint knows."""
    x = torch.zeros(64 * 200)
    x[3000:3150] = torch.linspace(1, 2, 150)
    return x, torch.arange(3150 - K, 3150)


def fooled_sample() -> tuple[Tensor, Tensor]:
    """The greatest are just where the sample looks, and fewer than k."""
    x, low = normal().clamp(max=2.0), 0xFFFFFFFF
    for j in range(0, 64, 3):
        first, stop = j * N >> 6, (j + 1) * N >> 6
        odd = (j * 2654435761 & low) ^ 0x9E3779B9
        odd = (odd ^ odd >> 15) * 0x85EBCA6B & low
        x[first + (odd * (stop - first) >> 32)] = 3.0
    return x, torch.arange(K)


ROWS = (
    lowest_hint, ties_at_the_top, few_valid_hints, log_normal, many_ties_over_windows, greatest_over_windows,
    nan_and_infinity, all_nan, subnormal, hidden_from_the_sample, fooled_sample,
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_adversarial_rows_are_exact(row) -> None:
    x, hint = row()
    assert torch.equal(simulated(x, K, hint, seed=1), top_k_reference(x, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype) -> None:
    for row in (lowest_hint, ties_at_the_top, nan_and_infinity):
        x, hint = row()
        x = x.to(dtype)
        assert torch.equal(simulated(x, K, hint), top_k_reference(x, K))


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 400), seed=st.integers(0, 99), values=st.sampled_from([2, 30, 10**6]),
    share=st.floats(0, 1), hints=st.integers(0, 20), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_rows_of_any_size_begin_anywhere(n, seed, values, share, hints, dtype) -> None:
    """Rows of an odd number of elements: the second begins in the middle of 16 bytes."""
    x = (torch.randint(-values, values, (3, n), generator=rng(seed)).float() / 7).to(dtype)
    k = max(1, min(50, round(share * n)))
    hint = torch.randint(-5, n + 5, (3, hints), generator=rng(seed))
    assert torch.equal(simulated(x, k, hint), top_k_reference(x, k))


def ties_among_the_kept() -> tuple[Tensor, Tensor]:
    x = normal()
    x[x > 1.5] = 1.5  # fewer than there is room for, more than k
    return x, torch.arange(K)


def signed_zeros() -> tuple[Tensor, Tensor]:
    x = -torch.ones(N)
    x[::9], x[::18] = 0.0, -0.0
    return x, torch.arange(K)


MUTATIONS = {
    "a guess is not verified": ("found = count if count >= k and", "found = count if", fooled_sample),
    "more than there is room for": ("and count <= i32(room) else", "else", ties_at_the_top),
    "ties are not counted down": ("u32(ties - used)", "ties", many_ties_over_windows),
    "equals are greater": ("if key > kth:", "if key >= kth:", ties_among_the_kept),
    "NaN is below": ("return u32(0xFFFFFFFF)", "return u32(0)", nan_and_infinity, radix),
    "zeros differ": ("bits = u32(0)\n", "pass\n", signed_zeros, radix),
    "a barrier is missing": ("ptx.barrier()\n                keep(", "keep(", lowest_hint),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(name: str) -> None:
    old, new, row, *where = MUTATIONS[name]
    x, hint = row()
    want = top_k_reference(x, K)
    if where:  # in what the kernel is made of
        part = mutated(where[0], old, new)
        module = mutated(top_k_gpu)
        vars(module)["ordered"] = part.ordered
    else:
        module = mutated(top_k_gpu, old, new)
    assert torch.equal(simulated(x, K, hint, seed=3), want)
    wrong = 0
    for seed in range(2):
        try:
            wrong += not torch.equal(simulated(x, K, hint, module, seed), want)
        except (IndexError, SimulationError):  # it writes beyond its arrays, or threads part ways
            wrong += 1
    assert wrong, "no one would have noticed"
