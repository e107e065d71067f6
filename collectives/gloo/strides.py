"""Which tensors gloo can take: its own words for the others are wrong results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dense(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors with holes between their elements: gloo takes memory from the first element on, and says nothing.

    Raises:
        ValueError: such a tensor.
    """
    for x in tensors:
        if x.layout is not torch.strided or x.is_contiguous():
            continue
        # what torch makes like a tensor has its strides only where those leave no holes
        if torch.empty_like(x, device="meta").stride() != x.stride():
            raise strided(x)


def strided(x: Tensor) -> ValueError:
    """Make the error of a tensor that gloo cannot take."""
    return ValueError(
        f"gloo cannot send a tensor of shape {tuple(x.shape)} and strides {x.stride()} in this call; give it as "
        ".contiguous(), or use backend 'shm' or 'mpi', which take any strides"
    )
