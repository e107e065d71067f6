"""Which tensors gloo can take: its own words for the others are wrong results, or a line of its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..sendable import check_sendable

_SUM = dist.ReduceOp.RedOpType.SUM.value  # an operator's hash
_BITWISE = ("BAND", "BOR", "BXOR")
_OPERATORS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", *_BITWISE)


def check_dense(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors with holes between their elements: gloo takes memory from the first element on, and says nothing.

    Raises:
        ValueError: such a tensor.
    """
    check_sendable("gloo", tensors)
    for x in tensors:
        # what torch makes like a tensor has its strides only where those leave no holes
        if not x.is_contiguous() and torch.empty_like(x, device="meta").stride() != x.stride():
            raise strided(x)


def check_contiguous(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors whose elements do not follow one another in their order.

    Raises:
        ValueError: such a tensor.
    """
    check_sendable("gloo", tensors)
    for x in tensors:
        if not x.is_contiguous():
            raise strided(x)


def check_alike(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors whose elements are not all in one order: gloo adds memory, element after element.

    Raises:
        ValueError: such tensors.
    """
    if not all(x.is_contiguous() for x in tensors):
        check_dense(tensors)
        if len({(x.shape, x.stride()) for x in tensors}) > 1:
            raise strided(next(x for x in tensors if not x.is_contiguous()))


def check_operator(op: Any, tensors: Sequence[Tensor]) -> None:
    """Refuse operators that a dtype does not have: gloo finds that out of a mean of whole numbers after it has summed.

    Raises:
        ValueError: such an operator.
    """
    if hash(op) == _SUM:  # in a tenth of the time of its name
        return
    name = dist.ReduceOp.RedOpType(op.op.value).name
    for x in tensors:
        if x.is_complex():
            known: Sequence[str] = ("SUM", "AVG")
        elif x.is_floating_point():
            known = _OPERATORS[: -len(_BITWISE)]
        else:
            known = [each for each in _OPERATORS if each != "AVG"]
        if name not in known:
            raise ValueError(
                f"gloo: {name} is not defined for {x.dtype}, which has {', '.join(known)}; convert the tensor"
            )


def one_dtype(what: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors of several dtypes in one call.

    Raises:
        ValueError: there are such.
    """
    for x in tensors:
        if x.dtype != tensors[0].dtype:
            raise ValueError(
                f"gloo: {what} of {tensors[0].dtype} with tensors of {x.dtype}; use one dtype"
            )


def strided(x: Tensor) -> ValueError:
    """Make the error of a tensor that gloo cannot take."""
    return ValueError(
        f"gloo cannot send a tensor of shape {tuple(x.shape)} and strides {x.stride()} in this call; give it as "
        ".contiguous(), or use backend 'shm' or 'mpi', which take any strides"
    )
