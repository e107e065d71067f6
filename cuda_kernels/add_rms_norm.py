"""Add to the residual stream and normalise it: one pass over memory instead of torch's eight.

    sum = residual + x;  normed = sum / sqrt(mean(sum ** 2) + eps) * weight

Source: RMSNorm (arXiv 1910.07467) as transformers computes it: fp32 inside, rounded to the dtype before the weight.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .add_norm_gpu import add_norm_cuda, serves
from .gpu.toolchain import usable
from .kernel_cache import njit
from .merge import direct
from .room import room
from .workers import run_rows

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


# NaN, infinities and each value's rounding stay torch's: only the sum of squares is taken in another order.
FAST = {"reassoc", "contract", "nsz"}
LOW, HALF = np.uint32(16), np.uint32(0xFFFF0000)


@njit(nogil=True, fastmath=FAST)
def _rows_float32(x, residual, weight, eps, normed, total, start, stop):
    """Rows start..stop, each through a slice of its own: with two indices the loops do not become vector code."""
    width = x.shape[1]
    for r in range(start, stop):
        a, b, new, out = x[r], residual[r], total[r], normed[r]
        squares = np.float32(0)
        for i in range(width):
            value = a[i] + b[i]
            new[i] = value
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + np.float32(eps))
        for i in range(width):
            out[i] = new[i] * scale * weight[i]


@njit(nogil=True)
def _low(pair):
    return np.uint32(pair << LOW).view(np.float32)


@njit(nogil=True)
def _high(pair):
    return np.uint32(pair & HALF).view(np.float32)


@njit(nogil=True)
def _to_even(value):
    """Bits whose upper half is the nearest bfloat16. A NaN of ours has zeros below, as bfloat16 has: it stays one."""
    bits = np.float32(value).view(np.uint32)
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> LOW) & np.uint32(1)))


@njit(nogil=True)
def _pair(low, high):
    return np.uint32((_to_even(low) >> LOW) | (_to_even(high) & HALF))


@njit(nogil=True, fastmath=FAST)
def _rows_bfloat16(x, residual, weight, eps, normed, total, start, stop):
    """The same on pairs of bfloat16 in a word, rounded where torch rounds; half the work is that rounding."""
    width = x.shape[1]
    for r in range(start, stop):
        a, b, new, out = x[r], residual[r], total[r], normed[r]
        lows, highs = np.float32(0), np.float32(0)
        for i in range(width):
            pair = _pair(_low(a[i]) + _low(b[i]), _high(a[i]) + _high(b[i]))
            new[i] = pair
            lows += _low(pair) * _low(pair)
            highs += _high(pair) * _high(pair)
        mean = (lows + highs) / np.float32(2 * width)
        scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
        for i in range(width):
            low = _high(_to_even(_low(new[i]) * scale))
            high = _high(_to_even(_high(new[i]) * scale))
            out[i] = _pair(low * _low(weight[i]), high * _high(weight[i]))


KERNELS = {torch.float32: _rows_float32, torch.bfloat16: _rows_bfloat16}


def _words(x: Tensor) -> np.ndarray:
    """See float32 as it is, bfloat16 as pairs."""
    x = x.detach()
    return (x if x.dtype == torch.float32 else x.view(torch.uint32)).numpy()


def _served(*tensors: Tensor) -> bool:
    """Say whether the CPU kernels take them: contiguous, of one dtype, bfloat16 in whole words."""
    first = tensors[0]
    if first.dtype not in KERNELS or not first.numel() or first.device.type != "cpu":
        return False
    return all(
        t.dtype == first.dtype and t.is_contiguous() and t.shape[-1] * t.element_size() % 4 == 0
        and t.storage_offset() * t.element_size() % 4 == 0
        for t in tensors
    )  # fmt: skip


def add_rms_norm_plain(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute without autograd: in Numba for float32 and bfloat16 on the CPU, else torch."""
    if not _served(x, residual, weight):
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, total = room(x.shape, x.dtype), room(x.shape, x.dtype)
    w, rows_of = _words(weight), KERNELS[x.dtype]
    a, b, out, new = (_words(t).reshape(-1, w.size) for t in (x, residual, normed, total))

    def part(start: int, stop: int) -> None:
        rows_of(a, b, w, eps, out, new, start, stop)

    run_rows(part, a.shape[0], ROWS_A_THREAD)
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
