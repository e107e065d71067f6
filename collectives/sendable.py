"""Which tensors can be sent: those that have memory, and whose memory holds their numbers as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_sendable(backend: str, tensors: Sequence[Tensor]) -> None:
    """Look whether each tensor's memory can be sent, or received into.

    Raises:
        ValueError: one's cannot.
    """
    for x in tensors:
        if x.layout is not torch.strided or x.is_meta or x.is_neg() or x.is_conj() or wraps(x):
            raise unsendable(backend, x)


def wraps(x: Tensor) -> bool:
    """Say whether a tensor has no memory but that of tensors inside, as a DTensor."""
    if type(x) is Tensor or not x.numel():
        return False
    try:
        return not x.data_ptr()
    except RuntimeError:
        return True


def unsendable(backend: str, x: Tensor) -> ValueError:
    """Make the error of a tensor whose memory cannot be sent."""
    if x.layout is torch.strided and (x.is_neg() or x.is_conj()):
        how = "neg" if x.is_neg() else "conj"  # a mark that torch applies when it reads the tensor
        marked = {"neg": "negated", "conj": "conjugated"}[how]
        return ValueError(
            f"{backend}: the memory of a tensor of shape {tuple(x.shape)} holds its numbers {marked} (is_{how}() is "
            f"true: it is a view of a conjugate); give it as .resolve_{how}()"
        )
    if x.is_meta or not (x.is_cpu or x.is_cuda):
        return ValueError(
            f"{backend}: a tensor on device {x.device} cannot be sent; give it as .cpu(), or use another backend"
        )
    sparse = x.layout is not torch.strided
    inside = "it as .to_dense(), or send its indices and values" if sparse else "the tensors in it"
    return ValueError(
        f"{backend}: a tensor of layout {x.layout} ({type(x).__name__}) has no memory to send; give {inside}"
    )
