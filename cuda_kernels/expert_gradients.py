"""Gradients of rows that were weighed and added to their tokens: of the rows, and of the router's weights.

of_rows[i] = weight of pair order[i] * grad[token of i];  of_weights[pair] = sum of grad[token] . rows[i]
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .gpu import ptx
from .gpu.kernel import Variant, kernel, run_on
from .gpu.ptx import f32, i32, u32, u64
from .gpu.toolchain import usable
from .gpu.vectors import VECTORS
from .halves import narrow, widen
from .kernel_cache import njit
from .numbers import bits_of
from .workers import run_rows

ELEMENTS_A_THREAD = 1 << 16  # a thread's start costs about 30 us
SERVED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cpu_serves(*tensors: Tensor) -> bool:
    """Whether the CPU kernels take such tensors."""
    return all(t.device.type == "cpu" and t.dtype in SERVED for t in tensors)


def cuda_serves(rows: Tensor, *scales: Tensor) -> bool:
    """Whether the CUDA kernels take such rows: a dtype of `VECTORS`, rows of whole 16-byte pieces, float32 weights."""
    fits = rows.dtype in VECTORS and rows.shape[1] * rows.element_size() % 16 == 0
    aligned = rows.data_ptr() % 16 == 0 and rows.numel() > 0
    return fits and aligned and all(s.dtype == torch.float32 for s in scales)


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _combine_backward(grad, rows, order, weights, top_k, of_rows, of_weights, start, stop):
    """Gradients of a range of rows, and of the weight of each row's pair: one for each row, summed by the caller."""
    width = rows.shape[1]
    for i in range(start, stop):
        token, weight, dot = order[i] // top_k, weights[order[i]], weights.dtype.type(0)
        for c in range(width):
            part = widen(grad[token, c])
            dot += part * widen(rows[i, c])
            of_rows[i, c] = narrow(weight * part, of_rows)
        of_weights[i] = dot


def _gradients(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    top_k = weights.shape[1]
    if not cpu_serves(grad, rows, weights):
        weighed = grad.index_select(0, order // top_k)
        of_rows = weights.reshape(-1).index_select(0, order).unsqueeze(-1) * weighed
        dots = (weighed.to(weights.dtype) * rows.to(weights.dtype)).sum(-1)
        of_weights = weights.new_zeros(weights.numel()).index_add(0, order, dots)
        return of_rows.to(rows.dtype), of_weights.view_as(weights)
    wide = torch.promote_types(torch.promote_types(torch.float32, rows.dtype), weights.dtype)
    of_rows = rows.new_empty(rows.shape)
    scales = weights.detach().reshape(-1).to(wide).numpy()
    pairs, dots = order.contiguous().numpy(), np.empty(order.numel(), scales.dtype)
    given, source, target = (bits_of(t.detach().contiguous()) for t in (grad, rows, of_rows))

    def part(start: int, stop: int) -> None:
        _combine_backward(given, source, pairs, scales, top_k, target, dots, start, stop)

    run_rows(part, len(pairs), ELEMENTS_A_THREAD // max(1, rows.shape[1]))
    of_weights = torch.zeros(weights.numel(), dtype=wide).index_add(
        0, order, torch.from_numpy(dots)
    )
    return of_rows, of_weights.view_as(weights).to(weights.dtype)


@kernel(threads=256, table=[{"dtype": torch.bfloat16}, {"dtype": torch.float32}])
def combine_gradients(dtype, threads):
    """Gradients of a row and of its weight; a block for each row."""
    width, unpack, pack = VECTORS[dtype]

    def body(
        grad: u64, rows: u64, scales: u64, tokens: u64, of_rows: u64, of_scales: u64, pieces: i32
    ):
        here, stride = u64(u32(ptx.block())), u64(u32(pieces)) * u64(16)
        given, row = grad + u64(ptx.ld4(tokens + here * u64(4))) * stride, here * stride
        weight, dot = ptx.ld_f32(scales + here * u64(4)), f32(0)
        g, x = ptx.local(width, f32), ptx.local(width, f32)
        piece = ptx.thread()
        while piece < pieces:
            offset = u64(u32(piece)) * u64(16)
            a, b, c4, d = ptx.ld16(given + offset)
            e, f, h, k = ptx.ld16_once(rows + row + offset)
            unpack(a, b, c4, d, g, 0)
            unpack(e, f, h, k, x, 0)
            for c in range(width):
                dot += g[c] * x[c]
                g[c] *= weight
            a, b, c4, d = pack(g, 0)
            ptx.st16(of_rows + row + offset, a, b, c4, d)
            piece = i32(piece + threads)
        dot = ptx.block_sum(dot)
        if ptx.thread() == i32(0):
            ptx.st_f32(of_scales + here * u64(4), dot)

    return body


def gradients_launch(
    grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor, of_rows: Tensor, of_scales: Tensor
) -> tuple[Variant, int, tuple[int, ...], tuple[Tensor, ...]]:
    """Choose the variant, the grid and the arguments for contiguous rows; keep the last while the kernel runs."""
    kept = weights.reshape(-1).index_select(0, order), (order // weights.shape[1]).int()
    pieces = rows.shape[1] * rows.element_size() // 16
    pointers = tuple(t.data_ptr() for t in (grad, rows, *kept, of_rows, of_scales))
    return combine_gradients(dtype=rows.dtype), len(order), (*pointers, pieces), kept


@torch.library.custom_op("plait::unpermute_rows_gradients", mutates_args=())
def unpermute_rows_gradients_op(
    grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute_rows`."""
    return _gradients(grad, rows, order, weights)


@unpermute_rows_gradients_op.register_kernel("cuda")
def _(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    grad, rows = grad.contiguous(), rows.contiguous()
    if not (cuda_serves(grad) and cuda_serves(rows, weights) and usable()):
        return _gradients(grad, rows, order, weights)
    of_rows, dots = rows.new_empty(rows.shape), rows.new_empty(len(order), dtype=torch.float32)
    *launch, _kept = gradients_launch(grad, rows, order, weights, of_rows, dots)
    run_on(launch, grad)
    of_weights = weights.new_zeros(weights.numel()).index_add(0, order, dots)
    return of_rows, of_weights.view_as(weights)


@unpermute_rows_gradients_op.register_fake
def _(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)
