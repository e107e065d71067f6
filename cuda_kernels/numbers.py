"""Tensors as CPU kernels read them: 16-bit floats as the integers of `halves`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .halves import narrow, widen
from .kernel_cache import njit

LOOKS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
BITS_OF_HALF = {torch.bfloat16: np.dtype(np.uint16), torch.float16: np.dtype(np.int16)}

# What a kernel that is given addresses is told of a dtype: an array of its elements, and of those it computes with.
LIKE = {
    torch.float64: (np.empty(0, np.float64), np.empty(0, np.float64)),
    torch.float32: (np.empty(0, np.float32), np.empty(0, np.float32)),
    torch.bfloat16: (np.empty(0, np.uint16), np.empty(0, np.float32)),
    torch.float16: (np.empty(0, np.int16), np.empty(0, np.float32)),
}


def addressable(*tensors: Tensor) -> bool:
    """Say whether a CPU kernel may be given their addresses: plain tensors in host memory, whose numbers lie there."""
    return all(type(t) in (Tensor, Parameter) and t.is_cpu and not t.is_neg() for t in tensors)


def bits_of(x: Tensor) -> np.ndarray:
    """See a tensor in host memory as an array; bfloat16 as uint16 and float16 as int16, for `widen` and `narrow`."""
    look = LOOKS.get(x.dtype)
    return (x.detach() if look is None else x.detach().view(look)).numpy()


def flat(pages: Tensor) -> np.ndarray:
    """View contiguous pages as one numpy row; 16-bit floats as their bits."""
    if not pages.is_contiguous():
        raise ValueError(
            f"pages {list(pages.shape)} with strides {pages.stride()} are read in place and must be contiguous"
        )
    return pages.view(LOOKS.get(pages.dtype, pages.dtype)).view(-1).numpy()


def plain(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Give one dtype and layout to the compiler: each other combination is one more compilation."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        tensor = tensor.to(dtype).contiguous()
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit float for scales of such a page: its own, so that nothing overflows in it; float16 for wider ones."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


@njit(nogil=True)
def widen_run(row, wide):
    """Widen a run; give the bits of its largest magnitude, NaN above all."""
    worst = np.int32(0)
    for i in range(row.size):
        value = np.float32(widen(row[i]))
        wide[i] = value
        size = np.int32(np.int32(value.view(np.int32)) & np.int32(0x7FFFFFFF))
        worst = size if size > worst else worst
    return np.uint32(worst)


@njit(nogil=True)
def narrow_run(wide, out):
    """Write a run of float32: by itself it becomes vector code, after a look-up in the same loop it does not."""
    for i in range(wide.size):
        out[i] = narrow(wide[i], out)
