"""All-reduce, residual add and norm in one step: what stands between the matrix products of a cut decoder layer.

A group that can do it in one kernel has a method `all_reduce_norm` (backend `shm`, see shm/fused.py), or its ranks'
devices have each other's memory mapped (CUDA, see peer_norm.py); on any other it is an all-reduce, then the add and the
norm. All are differentiable, and all ranks hold the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from ..cuda_kernels.add_rms_norm import add_layer_norm, add_rms_norm, rms_norm_reference
from ..cuda_kernels.quantised import TOPS, quantise_rows
from . import primitive
from .peer_norm import norms
from .primitive import Group


class _AllReduceNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Any, eps: float, group: Group
    ) -> tuple[Any, Tensor]:
        normed, total = _compute(x, residual, weight, bias, eps, group, None, keep=True)
        ctx.eps = eps
        ctx.save_for_backward(total, weight, bias)
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Every rank has the whole gradient of the sum, which is that of each rank's part of it."""
        total, weight, bias = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (total, weight, bias) if t is not None]
            normed = _norm(leaves[0], leaves[1], leaves[2] if bias is not None else None, ctx.eps)
        through, *parameters = torch.autograd.grad(normed, leaves, grads[0])
        through = through + grads[1]
        of_bias = parameters[1] if bias is not None else None
        return through, through, parameters[0], of_bias, None, None


def all_reduce_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group: Group,
    *,
    quantised: torch.dtype | None = None,
) -> tuple[Any, Tensor]:
    """Sum ``x`` over the group, add it to the residual, and normalise; ``x`` may be overwritten.

    ``quantised`` (int8 or float8_e4m3fn) gives the normed rows as `Quantised(values, scales)`: `values * scales` is
    the row, `scales` [..., 1] in float32 its largest magnitude over the format's; no gradients.

    Shape: x, residual [..., hidden], weight [hidden] -> normed, sum [..., hidden]; equal bits on all ranks.
    Collective: all ranks of the group; one all-reduce of ``x``; backward none.

    Raises:
        ValueError: the shapes do not belong together, or a quantised output is to be differentiated.
        TypeError: this rank is not in the group.
    """
    return _all_reduce_norm(x, residual, weight, None, eps, group, quantised)


def all_reduce_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    group: Group,
    *,
    quantised: torch.dtype | None = None,
) -> tuple[Any, Tensor]:
    """As `all_reduce_rms_norm`, with LayerNorm.

    Shape: x, residual [..., hidden], weight, bias [hidden] -> normed, sum [..., hidden]; equal bits on all ranks.
    Collective: all ranks of the group; one all-reduce of ``x``; backward none.
    """
    return _all_reduce_norm(x, residual, weight, bias, eps, group, quantised)


def _all_reduce_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, group: Group,
    quantised: torch.dtype | None,
) -> tuple[Any, Tensor]:  # fmt: skip
    shape = x.shape
    fits = residual.shape == shape and weight.shape == shape[-1:]
    if not fits or not (bias is None or bias.shape == weight.shape):
        raise ValueError(
            f"all-reduce and norm: x {list(x.shape)}, residual {list(residual.shape)} and weight {list(weight.shape)} "
            "do not fit; use x and residual [..., hidden] with weight (and bias) [hidden]"
        )
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(
            f"all-reduce and norm: {group!r} is no process group of this rank; give one that it belongs to, or None "
            "for one rank alone"
        )
    records = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias)
    )
    if quantised is None:
        if records:
            return _AllReduceNorm.apply(x, residual, weight, bias, eps, group)
    elif records or quantised not in TOPS:
        raise ValueError(
            f"a norm quantised to {quantised} cannot be computed{' with gradients' if records else ''}; "
            f"use {' or '.join(map(str, TOPS))} under torch.no_grad()"
        )
    return _compute(x, residual, weight, bias, eps, group, quantised)


def _compute(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, group: Group,
    quantised: torch.dtype | None, *, keep: bool = False,
) -> tuple[Any, Tensor]:  # fmt: skip
    """In one kernel if the group has one; ``keep``: do not overwrite ``x``."""
    kernel = getattr(group, "all_reduce_norm", None) or norms.of(group, x)
    done = kernel and kernel(x, residual, weight, bias, eps, quantised)
    if done is not None:
        return done
    reduced = primitive.all_reduce(x.clone() if keep else x.contiguous(), group)
    if bias is None:
        normed, total = add_rms_norm(reduced, residual, weight, eps)
    else:
        normed, total = add_layer_norm(reduced, residual, weight, bias, eps)
    return normed if quantised is None else quantise_rows(normed, quantised), total


def _norm(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is None:
        return rms_norm_reference(total, weight, eps)
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)
