"""Add to the residual stream and normalise it: one pass over memory instead of torch's eight.

    sum = residual + x;  normed = sum / sqrt(mean(sum ** 2) + eps) * weight

Source: RMSNorm (arXiv 1910.07467) as transformers computes it: fp32 inside, rounded to the dtype before the weight.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .halves import narrow, widen
from .merge import direct
from .workers import run_shares

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


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _add_rms_norm(x, residual, weight, eps, normed, total, start, stop):
    """Rows start..stop; every value is rounded where torch would round it."""
    width = x.shape[1]
    for r in range(start, stop):
        squares = np.float32(0)
        for i in range(width):
            stored = narrow(widen(x[r, i]) + widen(residual[r, i]), x)
            total[r, i] = stored
            squares += widen(stored) * widen(stored)
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(eps))
        for i in range(width):
            rounded = narrow(widen(total[r, i]) * scale, x)
            normed[r, i] = narrow(widen(rounded) * widen(weight[i]), x)


def add_rms_norm_plain(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute without autograd: in Numba for float32 and bfloat16 on the CPU, else torch."""
    alike = x.dtype == residual.dtype == weight.dtype and x.shape == residual.shape
    served = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
    if not (alike and served and x.is_contiguous() and residual.is_contiguous()) or not x.numel():
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, total = torch.empty_like(x), torch.empty_like(x)
    tensors = [t.detach().view(-1, x.shape[-1]) for t in (x, residual, normed, total)]
    tensors.insert(2, weight.detach())
    if x.dtype == torch.bfloat16:
        tensors = [t.view(torch.uint16) for t in tensors]
    a, b, w, out, new = (t.numpy() for t in tensors)
    rows = a.shape[0]
    shares = max(1, min(torch.get_num_threads(), rows // ROWS_A_THREAD))

    def share(i: int) -> None:
        _add_rms_norm(a, b, w, eps, out, new, rows * i // shares, rows * (i + 1) // shares)

    run_shares(share, shares)
    return normed, total


@torch.library.custom_op("plait::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add and normalise behind torch's dispatcher, for tracers and compilers."""
    return add_rms_norm_plain(x, residual, weight, eps)


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


__all__ = ["add_rms_norm", "add_rms_norm_plain", "add_rms_norm_reference"]


# inlines halves.py 3d74d947
