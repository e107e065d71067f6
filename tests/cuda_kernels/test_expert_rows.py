"""Rows of experts: the kernels against plain torch, and permute and unpermute against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.cuda_kernels import permute_rows, sort_by_expert, unpermute_rows
from plait.cuda_kernels.expert_gradients import gradients_launch
from plait.cuda_kernels.expert_order import sort_by_expert_reference
from plait.cuda_kernels.expert_rows import (
    combine_launch,
    permute_rows_reference,
    unpermute_rows_reference,
)

SHAPES = st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 17))


def drawn(seed: int, tokens: int, top_k: int, experts: int, hidden: int, dtype=torch.float64):
    """Tokens, their choices and weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64).to(dtype)
    index = torch.randint(0, experts, (tokens, top_k), generator=g)
    return x, index, torch.rand(tokens, top_k, generator=g, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 5))
def test_the_order_is_the_stable_sort(shape: tuple[int, int, int, int], seed: int) -> None:
    _, index, _ = drawn(seed, *shape)
    index[::3] = shape[2]  # nobody's
    for found, right in zip(
        sort_by_expert(index, shape[2]), sort_by_expert_reference(index, shape[2]), strict=True
    ):
        assert torch.equal(found, right)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_choice_that_is_no_expert_is_named(wrong: int) -> None:
    index = torch.tensor([[0, 1], [2, wrong]])
    with pytest.raises(ValueError, match=f"token 1 chose expert {wrong}.*there are 4"):
        sort_by_expert(index, 4)


def orders(index: Tensor, experts: int, seed: int) -> Tensor:
    """An order with pairs missing and pairs twice, as capacity and slices of experts make them."""
    order, _ = sort_by_expert(index, experts)
    g = torch.Generator().manual_seed(seed)
    some = torch.randint(0, 3, (len(order),), generator=g)
    return order.repeat_interleave(some)


def measured(
    permute: Callable[..., Tensor], unpermute: Callable[..., Tensor], x: Tensor, order: Tensor, weights: Tensor
) -> list[Tensor]:  # fmt: skip
    """Values and gradients of the way there and back."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    rows = permute(x, order, weights.shape[1])
    out = unpermute(rows * 1.5, order, weights)
    seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(seed.to(out.dtype))
    assert x.grad is not None
    assert weights.grad is not None
    return [rows.detach(), out.detach(), x.grad, weights.grad]


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 5))
def test_values_and_gradients(shape: tuple[int, int, int, int], seed: int) -> None:
    x, index, weights = drawn(seed, *shape)
    order = orders(index, shape[2], seed)
    found = measured(permute_rows, unpermute_rows, x, order, weights)
    right = measured(permute_rows_reference, unpermute_rows_reference, x, order, weights)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_rows_for_many_threads() -> None:
    x, index, weights = drawn(0, 1500, 2, 8, 130)
    order = orders(index, 8, 0)
    found = measured(permute_rows, unpermute_rows, x, order, weights)
    right = measured(permute_rows_reference, unpermute_rows_reference, x, order, weights)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    """Eight rows of a token: each is rounded once, after the sum."""
    x, _, _ = drawn(1, 5, 8, 8, 33, dtype)
    order, weights = torch.randperm(40), torch.rand(5, 8)
    rows = permute_rows(x, order, 8)
    assert torch.equal(rows, x[order // 8])
    found = unpermute_rows(rows, order, weights)
    wide = unpermute_rows_reference(rows.double(), order, weights.double())
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert ((found.double() - wide).abs() <= 0.51 * eps * wide.abs() + 1e-6).all()


# --- negative controls ----------------------------------------------------------------------------


def other_order(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Take rows for sorted when they are not."""
    return unpermute_rows(rows, order.roll(1), weights)


def unweighed(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Add without the router's weights."""
    return unpermute_rows(rows, order, weights * 0 + 1)


def once(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Keep one of a pair's two rows."""
    out = torch.zeros(weights.numel(), rows.shape[1], dtype=rows.dtype)
    out = out.index_put((order,), rows)
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("mutated", [other_order, unweighed, once])
def test_mutations_fail(mutated: Any) -> None:
    x, index, weights = drawn(3, 12, 2, 4, 5)
    order = orders(index, 4, 3)
    found = measured(permute_rows, mutated, x, order, weights)[1]
    right = measured(permute_rows_reference, unpermute_rows_reference, x, order, weights)[1]
    assert (found - right).abs().max() > 1e-2


def test_operators_trace_and_refuse() -> None:
    x, index, weights = drawn(4, 6, 2, 3, 4)
    order, _ = sort_by_expert(index, 3)
    for op, given_ in (
        (torch.ops.plait.permute_rows, (x.requires_grad_(), order, 2)),
        (torch.ops.plait.unpermute_rows, (x[order // 2].detach().requires_grad_(), order, weights)),
    ):
        torch.library.opcheck(op, given_)
    with pytest.raises(ValueError, match="do not fit"):
        unpermute_rows(x[:5], order, weights)
    meta = permute_rows(x.to("meta"), order.to("meta"), 2)
    assert meta.shape == (12, 4)


# --- the CUDA kernels, simulated ------------------------------------------------------------------


def simulated(
    rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int, top_k: int
) -> Tensor:
    out = torch.full((tokens, rows.shape[1]), float("nan"), dtype=rows.dtype)
    variant, grid, args, _kept = combine_launch(rows, order, weights, out, top_k)
    variant.simulate(grid, *args)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighed", [True, False])
def test_the_cuda_kernel_combines(dtype: torch.dtype, weighed: bool) -> None:
    x, index, weights = drawn(5, 3, 6, 4, 24, dtype)
    order = orders(index, 4, 5)
    rows, given_ = permute_rows(x, order, 6), weights.float() if weighed else torch.ones(3, 6)
    rows[3, 2] = float("inf")  # what a row adds stays its own
    found = simulated(rows, order, given_ if weighed else None, 3, 6)
    right = unpermute_rows_reference(rows.double(), order, given_.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), right, rtol=eps, atol=1e-5)
    wrong = simulated(rows, order.flip(0), given_ if weighed else None, 3, 6)
    assert not torch.allclose(wrong.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernel_differentiates(dtype: torch.dtype) -> None:
    x, index, weights = drawn(6, 3, 2, 4, 16, dtype)
    order = orders(index, 4, 6)
    rows, given_ = permute_rows(x, order, 2), weights.float()
    grad = torch.randn(3, 16).to(dtype)
    of_rows, dots = torch.empty_like(rows), torch.empty(len(order))
    variant, grid, args, _kept = gradients_launch(grad, rows, order, given_, of_rows, dots)
    variant.simulate(grid, *args)
    wide = [t.double().requires_grad_() for t in (rows, given_)]
    unpermute_rows_reference(wide[0], order, wide[1]).backward(grad.double())
    found = torch.zeros(6).index_add(0, order, dots).view(3, 2)
    eps = torch.finfo(dtype).eps
    assert wide[0].grad is not None
    assert wide[1].grad is not None
    torch.testing.assert_close(of_rows.double(), wide[0].grad, rtol=eps, atol=1e-6)
    torch.testing.assert_close(found.double(), wide[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device(dtype: torch.dtype) -> None:
    x, index, weights = (t.cuda() for t in drawn(7, 300, 8, 16, 1024, dtype))
    order, _ = sort_by_expert(index, 16)
    found = measured(permute_rows, unpermute_rows, x, order, weights.float())
    right = measured(
        permute_rows_reference, unpermute_rows_reference, x.double(), order, weights.double()
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=2e-2 if a.dtype != torch.float32 else 1e-4, atol=1e-2
        )
