"""Rows of tokens in the order of their experts, and back.

    order, counts = sort_by_expert(index, experts)        # `expert_order`: pairs (token, choice) of one expert by one
    rows = permute_rows(x, order, top_k)                  # rows[i] = x[order[i] // top_k]
    y = unpermute_rows(rows, order, weights)              # y[t] = sum over rows of t of weight * row

A pair may be missing from an order (dropped, or another rank's) and may be there twice (slices of one expert).

Source: MoE Parallel Folding (arXiv 2504.14960) section 3.3; sums in one order, wide inside, so that ranks agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .expert_gradients import (
    ELEMENTS_A_THREAD,
    cpu_serves,
    cuda_serves,
    unpermute_rows_gradients_op,
)
from .gpu import ptx
from .gpu.kernel import Variant, kernel, run_on
from .gpu.ptx import f32, i32, u32, u64
from .gpu.toolchain import usable
from .gpu.vectors import VECTORS
from .halves import narrow, widen
from .kernel_cache import njit
from .merge import direct
from .numbers import bits_of
from .workers import run_rows

AT_ONCE = 4  # rows of a token that a GPU thread has in flight


def permute_rows_reference(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Take each pair's token, in plain torch, differentiable.

    Shape: x `[tokens, hidden]`, order `[rows]` (int64, pairs `token * top_k + choice`) -> `[rows, hidden]`
    """
    return x.index_select(0, order // top_k)


def unpermute_rows_reference(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Weigh rows and add them to their tokens, in plain torch, differentiable; sums in the weights' or wider dtype.

    Shape: rows `[rows, hidden]`, order `[rows]`, weights `[tokens, top_k]` -> `[tokens, hidden]`, as ``rows`` are
    """
    tokens, top_k = weights.shape
    wide = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
    weighed = rows.to(wide) * weights.reshape(-1).index_select(0, order).unsqueeze(-1).to(wide)
    total = weighed.new_zeros((tokens, rows.shape[1])).index_add(0, order // top_k, weighed)
    return total.to(rows.dtype)


# --- CPU kernels ----------------------------------------------------------------------------------


@njit(nogil=True)
def _by_token(order, top_k, starts, rows):
    """The rows of every token, in the order that they have: rows[starts[t]:starts[t + 1]]."""
    for i in range(order.shape[0]):
        starts[order[i] // top_k + 1] += 1
    for t in range(starts.shape[0] - 1):
        starts[t + 1] += starts[t]
    nexts = starts[:-1].copy()
    for i in range(order.shape[0]):
        token = order[i] // top_k
        rows[nexts[token]] = i
        nexts[token] += 1


@njit(nogil=True, fastmath={"contract"})
def _combine(rows, order, weights, top_k, starts, of_token, wide, out, first, last):
    """Weigh and add the rows of tokens first..last; `wide` is a row of the accumulator's type."""
    width = rows.shape[1]
    for t in range(first, last):
        wide[:] = 0
        for at in range(starts[t], starts[t + 1]):
            i = of_token[at]
            weight = weights[order[i]] if weights.size else wide.dtype.type(1)
            for c in range(width):
                wide[c] += weight * widen(rows[i, c])
        for c in range(width):
            out[t, c] = narrow(wide[c], out)


def _add_rows(
    rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int, top_k: int
) -> Tensor:
    """Add rows to their tokens, weighed or not."""
    if not cpu_serves(rows, *(() if weights is None else (weights,))):
        ones = rows.new_ones((tokens, top_k)) if weights is None else weights
        return unpermute_rows_reference(rows, order, ones)
    wide = torch.promote_types(torch.float32, rows.dtype if weights is None else weights.dtype)
    wide = torch.promote_types(wide, rows.dtype)
    out = rows.new_empty((tokens, rows.shape[1]))
    scales = (
        (rows.new_empty(0) if weights is None else weights.detach().reshape(-1)).to(wide).numpy()
    )
    pairs, source, target = order.contiguous().numpy(), bits_of(rows.contiguous()), bits_of(out)
    starts, of_token = np.zeros(tokens + 1, np.int64), np.empty(len(pairs), np.int64)
    _by_token(pairs, top_k, starts, of_token)

    def part(first: int, last: int) -> None:
        sums = torch.empty(rows.shape[1], dtype=wide).numpy()
        _combine(source, pairs, scales, top_k, starts, of_token, sums, target, first, last)

    run_rows(part, tokens, ELEMENTS_A_THREAD * tokens // max(1, rows.numel()))
    return out


# --- CUDA kernels ---------------------------------------------------------------------------------


@kernel(threads=256, table=[{"dtype": torch.bfloat16}, {"dtype": torch.float32}])
def combine_rows(dtype, threads):
    """Weigh and add the rows of a token; a block for each token, its threads share the token's 16-byte pieces."""
    width, unpack, pack = VECTORS[dtype]
    loaded = 4 * AT_ONCE

    def body(rows: u64, scales: u64, of_token: u64, starts: u64, out: u64, pieces: i32):
        begin = u64(u32(ptx.block())) * u64(4)
        first, last = i32(ptx.ld4(starts + begin)), i32(ptx.ld4(starts + begin + u64(4)))
        stride = u64(u32(pieces)) * u64(16)
        piece = ptx.thread()
        v, weights = ptx.local(loaded, u32), ptx.local(AT_ONCE, f32)
        acc, x = ptx.local(width, f32), ptx.local(width, f32)
        while piece < pieces:
            offset = u64(u32(piece)) * u64(16)
            for c in range(width):
                acc[c] = f32(0)
            at = first
            while at < last:
                for j in range(
                    AT_ONCE
                ):  # all loads first; beyond the end the first row again, which adds nothing
                    one = u64(u32(i32(at + j) if i32(at + j) < last else at)) * u64(4)
                    row = rows + u64(ptx.ld4(of_token + one)) * stride + offset
                    v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3] = ptx.ld16_once(row)
                    weights[j] = ptx.ld_f32(scales + one)
                for j in range(AT_ONCE):
                    unpack(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3], x, 0)
                    for c in range(width):
                        acc[c] += f32(weights[j] * x[c]) if i32(at + j) < last else f32(0)
                at = i32(at + AT_ONCE)
            a, b, c4, d = pack(acc, 0)
            ptx.st16(out + u64(u32(ptx.block())) * stride + offset, a, b, c4, d)
            piece = i32(piece + threads)

    return body


def combine_launch(
    rows: Tensor, order: Tensor, weights: Tensor | None, out: Tensor, top_k: int
) -> tuple[Variant, int, tuple[int, ...], tuple[Tensor, ...]]:
    """Choose the variant, the grid and the arguments for contiguous rows; keep the last while the kernel runs.

    Nothing is read by the host: the rows of each token are found by a sort on the device.
    """
    token = order // top_k
    of_token = torch.argsort(token, stable=True)
    counts = torch.zeros(out.shape[0] + 1, dtype=torch.int32, device=rows.device)
    counts = counts.index_add_(0, token + 1, torch.ones_like(token, dtype=torch.int32))
    starts = counts.cumsum(0, dtype=torch.int32)
    if weights is None:
        scales = torch.ones(len(order), device=rows.device)
    else:
        scales = weights.reshape(-1).index_select(0, order.index_select(0, of_token))
    kept = scales, of_token.int(), starts
    pieces = rows.shape[1] * rows.element_size() // 16
    pointers = tuple(t.data_ptr() for t in (rows, *kept, out))
    return combine_rows(dtype=rows.dtype), out.shape[0], (*pointers, pieces), kept


def _add_rows_cuda(
    rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int, top_k: int
) -> Tensor:
    rows = rows.contiguous()
    if (
        not cuda_serves(rows, *(() if weights is None else (weights,)))
        or not tokens
        or not usable()
    ):
        return _add_rows(rows, order, weights, tokens, top_k)
    out = rows.new_empty((tokens, rows.shape[1]))
    *launch, _kept = combine_launch(rows, order, weights, out, top_k)
    run_on(launch, rows)
    return out


# --- operators ------------------------------------------------------------------------------------


@torch.library.custom_op("plait::permute_rows", mutates_args=())
def permute_rows_op(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Permute behind torch's dispatcher; torch's own gather is as fast as a copy, only its gradient is not."""
    return permute_rows_reference(x, order, top_k)


@permute_rows_op.register_fake
def _(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return x.new_empty((order.shape[0], x.shape[1]))


@torch.library.custom_op("plait::add_rows", mutates_args=())
def add_rows_op(rows: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    """Add rows to their tokens: the gradient of `permute_rows`."""
    return _add_rows(rows, order, None, tokens, top_k)


@add_rows_op.register_kernel("cuda")
def _(rows: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    return _add_rows_cuda(rows, order, None, tokens, top_k)


@add_rows_op.register_fake
def _(rows: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    return rows.new_empty((tokens, rows.shape[1]))


@torch.library.custom_op("plait::unpermute_rows", mutates_args=())
def unpermute_rows_op(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Unpermute behind torch's dispatcher."""
    return _add_rows(rows, order, weights, weights.shape[0], weights.shape[1])


@unpermute_rows_op.register_kernel("cuda")
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return _add_rows_cuda(rows, order, weights, weights.shape[0], weights.shape[1])


@unpermute_rows_op.register_fake
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty((weights.shape[0], rows.shape[1]))


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, order, ctx.top_k = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(order)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return add_rows_op(grad, ctx.saved_tensors[0], ctx.tokens, ctx.top_k), None, None


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    of_rows, of_weights = unpermute_rows_gradients_op(grad, *ctx.saved_tensors)
    return of_rows, None, of_weights


permute_rows_op.register_autograd(_permute_backward, setup_context=_keep_order)
unpermute_rows_op.register_autograd(
    _unpermute_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def permute_rows(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Take the row of each pair's token. Differentiable; the gradient adds rows wide and in one order.

    Shape: x `[tokens, hidden]`, order `[rows]` (int64, pairs `token * top_k + choice`) -> `[rows, hidden]`
    """
    plain = direct(x) and not (torch.is_grad_enabled() and x.requires_grad)
    return (permute_rows_reference if plain else permute_rows_op)(x, order, top_k)


def unpermute_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Weigh rows and add them to their tokens; a token without rows gets zeros. Differentiable.

    The sum is in float32 or wider, in the order of ``order``: ranks that add the same rows get the same bits.

    Shape: rows `[rows, hidden]`, order `[rows]`, weights `[tokens, top_k]` -> `[tokens, hidden]`, as ``rows`` are

    Raises:
        ValueError: rows and order do not belong together.
    """
    if rows.shape[:1] != order.shape:
        raise ValueError(
            f"unpermute_rows: rows {list(rows.shape)} and order {list(order.shape)} do not fit; "
            "use rows [rows, hidden] with order [rows] and weights [tokens, top_k]"
        )
    wanted = torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad)
    if direct(rows) and not wanted:
        return _add_rows(rows, order, weights, weights.shape[0], weights.shape[1])
    return unpermute_rows_op(rows, order, weights)


__all__ = ["permute_rows", "unpermute_rows"]
