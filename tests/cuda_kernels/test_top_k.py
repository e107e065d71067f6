"""Exact top-k against a stable sort, on rows made to break threshold guessing; what they break stands beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.cuda_kernels import top_k
from plait.cuda_kernels.top_k import top_k_reference

N, K = 20_000, 512


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal() -> Tensor:
    return torch.randn(N, generator=rng())


def lowest_hint() -> tuple[Tensor, Tensor]:
    x = normal()
    return x, x.argsort()[:K]


def ties_at_the_top() -> tuple[Tensor, Tensor]:
    x = normal().clamp(max=0.0)  # half of the row is one value, and the answer lies in it
    return x, torch.randperm(N, generator=rng())[:K]


def few_valid_hints() -> tuple[Tensor, Tensor]:
    hint = torch.full((K,), -1)
    hint[:100] = torch.randperm(N, generator=rng())[:100]
    return normal(), hint


def log_normal() -> tuple[Tensor, Tensor]:
    x = (4 * torch.randn(131_072, generator=rng())).exp()
    return x, torch.randperm(len(x), generator=rng(1))[:K]


def one_hint_many_times() -> tuple[Tensor, Tensor]:
    return normal(), torch.full((3 * N,), 7)


def outside() -> tuple[Tensor, Tensor]:
    return normal(), torch.tensor([N, N + 5, -9, 2**40])


def steps() -> tuple[Tensor, Tensor]:
    x = torch.zeros(N)
    x[::50] = 1.0  # 400 ones: the answer is all of them and the first 112 zeros
    return x, torch.arange(0, N, 50)


def outliers() -> tuple[Tensor, Tensor]:
    x = normal()
    x[:10] = 1e30
    return x, torch.arange(K)


def nan_and_infinity() -> tuple[Tensor, Tensor]:
    x = normal()
    x[::7], x[1::7], x[2::7] = torch.nan, torch.inf, -torch.inf
    return x, torch.arange(0, 7 * K, 7)


def all_nan() -> tuple[Tensor, Tensor]:
    return torch.full((N,), torch.nan), torch.arange(K)


def hidden_from_samples() -> tuple[Tensor, Tensor]:
    x = torch.zeros(N)
    x[3000 : 3000 + K + 1] = torch.linspace(1, 2, K + 1)
    return x, torch.arange(K)


ROWS = (
    lowest_hint, ties_at_the_top, few_valid_hints, log_normal, one_hint_many_times, outside, steps,
    outliers, nan_and_infinity, all_nan, hidden_from_samples,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_adversarial_rows_are_exact(row, dtype) -> None:
    x, hint = row()
    x = x.to(dtype)
    want = top_k_reference(x, K)
    assert torch.equal(top_k(x, K, hint), want)
    assert torch.equal(top_k(x, K), want)


@given(
    n=st.integers(1, 6000), seed=st.integers(0, 99), values=st.sampled_from([2, 30, 10**6]),
    share=st.floats(0, 1), hints=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rows_of_any_size(n, seed, values, share, hints) -> None:
    x = torch.randint(-values, values, (3, n), generator=rng(seed)).float() / 7
    x[0, 0] = -0.0
    k = round(share * n)
    hint = torch.randint(-5, n + 5, (3, hints), generator=rng(seed))
    assert torch.equal(top_k(x, k, hint), top_k_reference(x, k))


def test_values_are_torchs_and_shapes_are_kept() -> None:
    x = torch.randn(2, 3, N, generator=rng())
    found = top_k(x, K)
    assert found.shape == (2, 3, K)
    assert torch.equal(x.gather(-1, found).sort(-1, True).values, x.topk(K).values)
    strided = x.transpose(0, 1)
    assert torch.equal(top_k(strided, K), found.transpose(0, 1))
    assert top_k(x[:0], K).shape == (0, 3, K)
    torch.library.opcheck(torch.ops.plait.top_k.default, (x, K, None))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_rows(threads, monkeypatch) -> None:
    x = torch.randn(7, 40_000, generator=rng())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(top_k(x, K), top_k_reference(x, K))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="k=5 of rows of 4 values; use 0 to 4"):
        top_k(torch.zeros(2, 4), 5)
    with pytest.raises(ValueError, match="must have the rows of x"):
        top_k(torch.zeros(2, 4), 1, torch.zeros(3, 1, dtype=torch.int64))


# ---- negative controls: the rows above are hard, and the comparison sees order and ties


def published(x: Tensor, k: int, hint: Tensor, room: int = 6144) -> Tensor:
    """The control flow as published: a secant from the hint's mean, 15 rounds, whatever it ends with."""
    held = x[hint[(hint >= 0) & (hint < len(x))]]
    low, high, at = held.min(), held.max(), held.mean()
    few, many = 1.0, 1.25 * k
    for _ in range(15):
        count = float((x >= at).sum())
        if k <= count <= room:
            break
        low, high = (at, high) if count > room else (low, at)
        few, many = (few, count) if count > room else (count, many)
        at = low + (high - low) * min(max((many - 1.5 * k) / max(many - few, 1), 0.05), 0.95)
    chosen = (x >= at).nonzero().flatten()[:room]  # the buffer holds no more
    return chosen[x[chosen].sort(descending=True, stable=True).indices[:k]].sort().values


def test_a_hint_of_the_lowest_breaks_a_guess_that_is_not_verified() -> None:
    x, hint = lowest_hint()
    want = top_k_reference(x, K)
    assert torch.equal(published(x, K, want), want), "with a good hint it is right"
    assert not torch.equal(published(x, K, hint), want)


def test_ties_by_another_rule_are_seen() -> None:
    x, _ = steps()
    highest_first = len(x) - 1 - top_k_reference(x.flip(0), K)
    assert not torch.equal(highest_first.sort().values, top_k(x, K))
