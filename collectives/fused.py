"""All-reduce, residual add and RMSNorm in one step."""

from __future__ import annotations

from torch import Tensor

from ..cuda_kernels.add_rms_norm import add_rms_norm
from . import primitive
from .primitive import Group


def all_reduce_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the group, add it to the residual, and normalise. No gradients; ``x`` is overwritten.

    Shape: x, residual [..., hidden], weight [hidden] -> normed, sum [..., hidden]; equal bits on all ranks.
    Collective: all ranks of the group; one all-reduce of ``x``.
    """
    return add_rms_norm(primitive.all_reduce(x, group), residual, weight, eps)
