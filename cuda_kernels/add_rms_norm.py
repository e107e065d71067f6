"""Add to the residual stream and normalise it: one pass over memory instead of torch's eight.

    sum = residual + x;  normed = sum / sqrt(mean(sum ** 2) + eps) * weight

Source: RMSNorm (arXiv 1910.07467) as transformers computes it: fp32 inside, rounded to the dtype before the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .add_norm_gpu import add_norm_cuda, serves
from .gpu.toolchain import usable
from .merge import direct
from .norm_rows import norm_rows
from .numbers import LIKE, addressable
from .room import room_like
from .runs import RUN
from .vectors import LINE
from .workers import run_rows

BEYOND = 8 << 20  # bytes of a result stored past the cache: measured, with a reader after it too
ROWS_A_THREAD = 64  # a thread's start costs about 30 us


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute it in plain torch, differentiable.

    Shape: x, residual `[..., width]`, weight `[width]` -> normed, sum `[..., width]`
    """
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32 (float64 stays), rounded to the dtype before the weight.

    Shape: x `[..., width]`, weight `[width]` -> `[..., width]`
    """
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _served(*tensors: Tensor) -> bool:
    """Say whether the CPU kernel takes them: contiguous, of one dtype."""
    dtype = tensors[0].dtype
    fit = all(t.dtype == dtype and t.is_contiguous() and t.numel() for t in tensors)
    return fit and dtype in LIKE and addressable(*tensors)


def add_rms_norm_plain(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute without autograd: in Numba on the CPU, else torch."""
    if not _served(x, residual, weight):
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, total = room_like(x), room_like(x)
    rows, width = x.numel() // weight.numel(), weight.numel()
    x_at, *others = (t.data_ptr() for t in (x, residual, weight, normed, total))
    past = normed.nbytes >= BEYOND and width % RUN == 0
    past = past and others[-2] % LINE == 0 and others[-1] % LINE == 0
    words = (*others, width, float(eps), past, *LIKE[x.dtype])
    run_rows(lambda start, stop: norm_rows(x_at, *words, start, stop), rows, ROWS_A_THREAD)
    return normed, total


@torch.library.custom_op("plait::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add and normalise behind torch's dispatcher, for tracers and compilers."""
    return add_rms_norm_plain(x, residual, weight, eps)


@add_rms_norm_op.register_kernel("cuda")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not (serves(x, residual, weight) and usable()):
        return add_rms_norm_reference(x, residual, weight, eps)
    return add_norm_cuda(x, residual, weight, None, eps)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(normed, sum)` of `residual + x`. Differentiable when an input requires grad.

    Shape: x, residual `[..., width]`, weight `[width]` -> normed, sum `[..., width]`

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"add_rms_norm: x {list(x.shape)}, residual {list(residual.shape)} and weight {list(weight.shape)} "
            "do not fit; use x and residual [..., width] with weight [width]"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight)):
        return add_rms_norm_reference(x, residual, weight, eps)
    return (add_rms_norm_plain if direct(x) else add_rms_norm_op)(x, residual, weight, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute it in plain torch, differentiable. Shape: as `add_layer_norm`."""
    total = residual + x
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps), total


@torch.library.custom_op("plait::add_layer_norm", mutates_args=())
def add_layer_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add and normalise behind torch's dispatcher: torch's own operations, but for CUDA."""
    return add_layer_norm_reference(x, residual, weight, bias, eps)


@add_layer_norm_op.register_kernel("cuda")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not (serves(x, residual, weight, bias) and usable()):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return add_norm_cuda(x, residual, weight, bias, eps)


@add_layer_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `(normed, sum)` of `residual + x`, by LayerNorm. Differentiable when an input requires grad.

    Shape: x, residual `[..., width]`, weight, bias `[width]` -> normed, sum `[..., width]`

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if x.shape != residual.shape or not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            f"add_layer_norm: x {list(x.shape)}, residual {list(residual.shape)}, weight {list(weight.shape)} and "
            f"bias {list(bias.shape)} do not fit; use x and residual [..., width] with weight and bias [width]"
        )
    plain = direct(x) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight, bias))
    )
    return (add_layer_norm_reference if plain else add_layer_norm_op)(
        x, residual, weight, bias, eps
    )


__all__ = ["add_layer_norm", "add_rms_norm", "add_rms_norm_plain", "add_rms_norm_reference"]
