"""What a call is, in numbers that kernels compare and in words for errors; and tensors as views."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..sendable import unsendable, wraps
from .fold import AVG, BAND, BOR, BXOR, LOOKS, MAX, MIN, PRODUCT, SUM, fold_address
from .memory import MAX_DIMS, VIEW_WORDS

KINDS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter",
    "all_to_all", "barrier", "all_reduce of symmetric tensors", "send", "all_reduce with norm",
)  # fmt: skip
KIND = {name: number for number, name in enumerate(KINDS)}
OPS = {
    dist.ReduceOp.SUM: SUM,
    dist.ReduceOp.AVG: AVG,
    dist.ReduceOp.PRODUCT: PRODUCT,
    dist.ReduceOp.MIN: MIN,
    dist.ReduceOp.MAX: MAX,
    dist.ReduceOp.BAND: BAND,
    dist.ReduceOp.BOR: BOR,
    dist.ReduceOp.BXOR: BXOR,
}
_OP_NAMES = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
_DTYPES = tuple(sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str))
_NUMBER = {dtype: number for number, dtype in enumerate(_DTYPES)}

_BOOL_OPS = {SUM: BOR, MAX: BOR, PRODUCT: BAND, MIN: BAND}  # True + True is True


def operator(dtype: torch.dtype, op: Any) -> int:
    """Number the operator by which tensors of this dtype are reduced.

    Raises:
        ValueError: the operator is none for this dtype.
    """
    number = OPS.get(_kind(op))
    if dtype not in LOOKS or number is None:
        known = ", ".join(str(d).removeprefix("torch.") for d in LOOKS)
        raise ValueError(
            f"shm cannot reduce {dtype} by {op_name(op)}; it reduces {known} (and complex sums) by "
            f"{', '.join(_OP_NAMES)}: convert the tensor, or use such an operator"
        )
    if number >= BAND and dtype.is_floating_point:
        raise ValueError(f"shm: {_OP_NAMES[number]} is for whole numbers and bool, not for {dtype}")
    if number == AVG and not dtype.is_floating_point:
        raise ValueError(f"shm: avg is for floating-point numbers, not for {dtype}; sum and divide")
    return _BOOL_OPS.get(number, number) if dtype == torch.bool else number


def op_name(op: Any) -> str:
    """Name an operator."""
    return _kind(op).name


def _kind(op: Any) -> Any:
    """Take an operator out of what options hold, which is equal to it in one order only."""
    return getattr(op, "op", op)


@lru_cache(maxsize=1024)
def code_of(kind: int, dtype: torch.dtype = torch.uint8, op: int = SUM, root: int = -1) -> int:
    """Pack what all ranks must agree on into the word that stands in the header."""
    return kind | _NUMBER[dtype] << 8 | op << 16 | (root + 1) << 24


def reduction(kind: str, dtype: torch.dtype, op: Any, root: int = -1) -> tuple[int, int, int]:
    """Look up, or compile once, what reduces a dtype by an operator: function, operator, code."""
    return _reduction(kind, dtype, op.op.value, root)  # to compare operators costs 1 us


@lru_cache(maxsize=1024)
def _reduction(kind: str, dtype: torch.dtype, op: int, root: int) -> tuple[int, int, int]:
    number = operator(dtype, dist.ReduceOp.RedOpType(op))
    return fold_address(dtype, number), number, code_of(KIND[kind], dtype, number, root)


def describe(code: int, count: int | str) -> str:
    """Say what a header means; the count may be given in words."""
    kind, dtype, op, root = code & 255, dtype_of(code), code >> 16 & 255, (code >> 24) - 1
    if KINDS[kind] == "barrier":
        return "barrier"
    text = f"{KINDS[kind]} of {count} {str(dtype).removeprefix('torch.')}".replace("  ", " ")
    if "reduce" in KINDS[kind]:
        text += f" by {_OP_NAMES[op]}"
    return text if root < 0 else f"{text}, root {root}"


def dtype_of(code: int) -> torch.dtype:
    """Read the dtype out of a header."""
    return _DTYPES[code >> 8 & 255]


@lru_cache(maxsize=4096)
def dense_view(address: int, item: int) -> Any:
    """Describe contiguous memory to a kernel; nobody writes to the answer, which is given again."""
    view = np.zeros(VIEW_WORDS, np.int64)
    view[0], view[2] = address, item
    return view


@lru_cache(maxsize=4096)
def dense_row(address: int, item: int) -> Any:
    """Describe it as a table of one view."""
    return dense_view(address, item).reshape(1, VIEW_WORDS)


def view_of(x: Tensor) -> Any:
    """Describe a tensor of any strides to a kernel; of no more than MAX_DIMS dims after merging."""
    if not x.is_cpu or x.layout is not torch.strided or x.is_neg() or x.is_conj() or wraps(x):
        raise unsendable("shm", x)
    item, address = x.itemsize, x.data_ptr()
    if x.is_contiguous():
        return dense_view(address, item)
    view = dense_view(address, item).copy()
    sizes, strides = merged_dims(x)
    if len(sizes) > MAX_DIMS:
        raise ValueError(
            f"shm: a tensor of shape {tuple(x.shape)} and strides {x.stride()} has {len(sizes)} dims that "
            f"do not merge, more than {MAX_DIMS}; give it contiguous"
        )
    view[1] = len(sizes)
    view[3 : 3 + len(sizes)] = sizes
    view[3 + MAX_DIMS : 3 + MAX_DIMS + len(sizes)] = [s * item for s in strides]
    return view


def merged_dims(x: Tensor) -> tuple[list[int], list[int]]:
    """Merge dims that are one run in memory, and drop those of size 1."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides


def views_of(tensors: list[Tensor]) -> Any:
    """Describe several tensors of one dtype, a row for each."""
    if len(tensors) == 1:
        (x,) = tensors
        plain = type(x) is Tensor and x.layout is torch.strided and x.is_cpu
        if plain and x.is_contiguous() and not (x.is_neg() or x.is_conj()):
            return dense_row(x.data_ptr(), x.itemsize)
        return view_of(x).reshape(1, VIEW_WORDS)
    return np.stack([view_of(x) for x in tensors])


def real_of(x: Tensor, op: Any) -> Tensor:
    """See a complex tensor as pairs of numbers, which can be added."""
    if OPS.get(_kind(op)) not in (SUM, AVG):
        raise ValueError(
            f"shm: {op_name(op)} has no meaning for {x.dtype}; complex tensors can be summed"
        )
    if x.is_conj():
        raise unsendable("shm", x)
    return torch.view_as_real(x)
