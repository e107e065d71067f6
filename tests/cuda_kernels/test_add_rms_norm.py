"""Add and normalise in one pass: against float64, and rounding for rounding against torch in bfloat16."""

from __future__ import annotations

import pytest
import torch

from plait.cuda_kernels import add_rms_norm as module
from plait.cuda_kernels.add_norm_gpu import norm_launch, serves
from plait.cuda_kernels.add_rms_norm import (
    add_layer_norm,
    add_layer_norm_op,
    add_rms_norm,
    add_rms_norm_op,
    add_rms_norm_plain,
    add_rms_norm_reference,
)
from plait.cuda_kernels.numbers import LIKE

SHAPES = [(1, 8), (3, 5, 64), (130, 33), (2, 0, 16), (257, 1024)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(sum(shape))
    x, residual = (torch.randn(shape, generator=g, dtype=torch.float64) * s for s in (1.0, 30.0))
    weight = torch.randn(shape[-1], generator=g, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, residual, weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_near_float64(shape: tuple[int, ...]) -> None:
    x, residual, weight = drawn(shape, torch.float32)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    wide = residual.double() + x.double()
    exact = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed.double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.equal(total, residual + x)
    if x.numel():  # the controls: another eps, another weight, no residual
        for wrong in (
            add_rms_norm(x, residual, weight, 30.0)[0],
            add_rms_norm(x, residual, weight + 0.01, 1e-5)[0],
            add_rms_norm(x, 0.99 * residual, weight, 1e-5)[0],
        ):
            assert (wrong - normed).abs().max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_exact(shape: tuple[int, ...]) -> None:
    x, residual, weight = drawn(shape, torch.float64)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    want, want_total = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert torch.equal(total, want_total)
    torch.testing.assert_close(normed, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_halves_round_where_torch_rounds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = drawn(shape, dtype)
    found, total = add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    # the sum of squares is taken in another order: a tie may fall the other way, now and then
    apart = (found != expected).float().mean() if found.numel() else torch.tensor(0.0)
    assert apart < 0.01
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("width", [128, 960, 1000])
@pytest.mark.parametrize("dtype", LIKE)
def test_no_bit_depends_on_the_way_the_place_or_the_threads(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the cache or through it, a row alone, inputs at odd places: rows of whole runs and others."""
    args, ways, kernel = drawn((150, width), dtype), [], module.norm_rows
    want = add_rms_norm(*args, 1e-5)

    def noted(*words) -> None:
        ways.append(words[7])
        kernel(*words)

    monkeypatch.setattr(module, "norm_rows", noted)
    monkeypatch.setattr(module, "BEYOND", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    odd = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in args]
    for found in (add_rms_norm(*args, 1e-5), add_rms_norm(*odd, 1e-5)):
        assert all(map(torch.equal, found, want))
    assert ways == [width % 64 == 0] * 4, "two calls of two threads, past the cache"
    alone = add_rms_norm(args[0][7:8], args[1][7:8], args[2], 1e-5)
    assert all(torch.equal(a[0], b[7]) for a, b in zip(alone, want, strict=True))
    assert not torch.equal(want[0], add_rms_norm(*args, 30.0)[0])


def test_special_values_pass_through() -> None:
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    residual = torch.tensor([[float("nan"), 1, 2, 3], [float("inf"), 1, 2, 3], [0, 0, 0, 0]])
    weight = torch.ones(4, dtype=torch.bfloat16)
    for dtype in LIKE:
        args = (x.to(dtype), residual.to(dtype), weight.to(dtype), 1e-5)
        for found, expected in zip(
            add_rms_norm_plain(*args), add_rms_norm_reference(*args), strict=True
        ):
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_gradients_flow_through_both_outputs() -> None:
    x, residual, weight = (t.requires_grad_() for t in drawn((3, 6), torch.float32))
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    (normed.sum() + total.square().sum()).backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in (x, residual, weight))
    assert torch.equal(x.grad, residual.grad)


def test_operator_agrees_with_its_fake() -> None:
    x, residual, weight = drawn((4, 16), torch.float32)
    torch.library.opcheck(add_rms_norm_op, (x, residual, weight, 1e-5))
    torch.library.opcheck(add_layer_norm_op, (x, residual, weight, weight, 1e-5))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight \[width\]"):
        add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match=r"bias \[width\]"):
        add_layer_norm(*torch.ones(2, 2, 4), torch.ones(4), torch.ones(3), 1e-5)


# ---- the CUDA kernel, simulated


def simulated(x, residual, weight, bias, eps):
    assert serves(x, residual, weight)
    normed, total = torch.full_like(x, 7), torch.full_like(x, 7)
    variant, grid, args = norm_launch(x, residual, weight, bias, eps, normed, total)
    variant.simulate(grid, *args)
    return normed, total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [8, 264, 1032])
def test_cuda_kernel(hidden: int, layer_norm: bool, dtype: torch.dtype) -> None:
    """Rows of few pieces, of more than a warp, and one of zeros."""
    x, residual, weight = drawn((3, hidden), dtype)
    x[-1], residual[-1] = 0, 0
    bias = weight.flip(0).contiguous() if layer_norm else None
    normed, total = simulated(x, residual, weight, bias, 1e-5)
    want = residual.double() + x.double()
    coarse = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}[dtype]
    torch.testing.assert_close(total.double(), want, rtol=coarse, atol=coarse)
    shape, wide = (hidden,), total.double()
    if bias is None:
        right = torch.nn.functional.rms_norm(wide, shape, weight.double(), 1e-5)
        wrong = torch.nn.functional.rms_norm(x.double(), shape, weight.double(), 1e-5)
    else:
        right = torch.nn.functional.layer_norm(wide, shape, weight.double(), bias.double(), 1e-5)
        wrong = torch.nn.functional.layer_norm(wide, shape, weight.double(), -bias.double(), 1e-5)
    torch.testing.assert_close(normed.double(), right, rtol=2 * coarse, atol=4 * coarse)
    assert (normed.double() - wrong).abs().max() > 0.1


def test_cuda_kernel_keeps_nan_and_infinity_visible() -> None:
    x, residual, weight = drawn((3, 64), torch.float32)
    x[0, 5], x[1, 9] = float("nan"), float("inf")
    for found, want in zip(
        simulated(x, residual, weight, None, 1e-5),
        add_rms_norm_reference(x, residual, weight, 1e-5),
        strict=True,
    ):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5, equal_nan=True)
