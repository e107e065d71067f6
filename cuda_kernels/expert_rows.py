"""Rows of tokens in the order of their experts, and back: permute, unpermute, and the order itself.

    order, counts = sort_by_expert(index, experts)        # pairs (token, choice), one expert's after another's
    rows = permute_rows(x, order, top_k)                  # rows[i] = x[order[i] // top_k]
    y = unpermute_rows(rows, order, weights)              # y[t] = sum over rows of t of weight * row

A pair may be missing from an order (dropped, or another rank's) and may be there twice (slices of one expert).

Source: MoE Parallel Folding (arXiv 2504.14960) section 3.3; sums in one order, wide inside, so that ranks agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .halves import narrow, widen
from .merge import direct
from .workers import run_shares

ELEMENTS_A_THREAD = 1 << 16  # a thread's start costs about 30 us
SERVED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sort_by_expert_reference(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of tokens and choices by expert, pairs of one expert by number, in plain torch.

    Pairs of expert number ``experts`` are nobody's: they come last and are not counted.

    Shape: index `[tokens, top_k]` (int64) -> order `[tokens * top_k]`, counts `[experts]`
    """
    flat = index.reshape(-1)
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=experts)[:experts]


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


@njit(nogil=True, cache=True)
def _sort(flat, order, counts):
    """Sort by counting: two passes over the pairs. A number out of range is told by its place, -1 if there is none."""
    experts = counts.shape[0] - 1
    for i in range(flat.shape[0]):
        if flat[i] < 0 or flat[i] > experts:
            return i
        counts[flat[i]] += 1
    nexts = np.empty(experts + 1, np.int64)
    total = 0
    for e in range(experts + 1):
        nexts[e] = total
        total += counts[e]
    for i in range(flat.shape[0]):
        order[nexts[flat[i]]] = i
        nexts[flat[i]] += 1
    return -1


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True, fastmath={"contract"})
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


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
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


def _array(t: Tensor) -> np.ndarray:
    """A tensor as a kernel takes it: halves as the words of `halves`."""
    words = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    t = t.detach().contiguous()
    return t.view(words.get(t.dtype, t.dtype)).numpy()


def _shares(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // ELEMENTS_A_THREAD))


def _served(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype in SERVED for t in tensors)


def _add_rows(
    rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int, top_k: int
) -> Tensor:
    """Add rows to their tokens, weighed or not."""
    if not _served(rows, *(() if weights is None else (weights,))):
        ones = rows.new_ones((tokens, top_k)) if weights is None else weights
        return unpermute_rows_reference(rows, order, ones)
    wide = torch.promote_types(torch.float32, rows.dtype if weights is None else weights.dtype)
    wide = torch.promote_types(wide, rows.dtype)
    out = rows.new_empty((tokens, rows.shape[1]))
    scales = (
        (rows.new_empty(0) if weights is None else weights.detach().reshape(-1)).to(wide).numpy()
    )
    pairs, source, target = order.contiguous().numpy(), _array(rows), _array(out)
    starts, of_token = np.zeros(tokens + 1, np.int64), np.empty(len(pairs), np.int64)
    _by_token(pairs, top_k, starts, of_token)
    shares = _shares(rows.numel())
    kept = torch.empty((shares, rows.shape[1]), dtype=wide).numpy()

    def share(i: int) -> None:
        first, last = tokens * i // shares, tokens * (i + 1) // shares
        _combine(source, pairs, scales, top_k, starts, of_token, kept[i], target, first, last)

    run_shares(share, shares)
    return out


def _unpermute_gradients(
    grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    top_k = weights.shape[1]
    if not _served(grad, rows, weights):
        weighed = grad.index_select(0, order // top_k)
        of_rows = weights.reshape(-1).index_select(0, order).unsqueeze(-1) * weighed
        dots = (weighed.to(weights.dtype) * rows.to(weights.dtype)).sum(-1)
        of_weights = weights.new_zeros(weights.numel()).index_add(0, order, dots)
        return of_rows.to(rows.dtype), of_weights.view_as(weights)
    wide = torch.promote_types(torch.promote_types(torch.float32, rows.dtype), weights.dtype)
    of_rows = rows.new_empty(rows.shape)
    scales = weights.detach().reshape(-1).to(wide).numpy()
    pairs, n, shares = order.contiguous().numpy(), order.numel(), _shares(rows.numel())
    dots = np.empty(n, scales.dtype)
    given, source, target = (_array(t) for t in (grad, rows, of_rows))

    def share(i: int) -> None:
        start, stop = n * i // shares, n * (i + 1) // shares
        _combine_backward(given, source, pairs, scales, top_k, target, dots, start, stop)

    run_shares(share, shares)
    of_weights = torch.zeros(weights.numel(), dtype=wide).index_add(
        0, order, torch.from_numpy(dots)
    )
    return of_rows, of_weights.view_as(weights).to(weights.dtype)


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


@add_rows_op.register_fake
def _(rows: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    return rows.new_empty((tokens, rows.shape[1]))


@torch.library.custom_op("plait::unpermute_rows", mutates_args=())
def unpermute_rows_op(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Unpermute behind torch's dispatcher."""
    return _add_rows(rows, order, weights, weights.shape[0], weights.shape[1])


@unpermute_rows_op.register_fake
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty((weights.shape[0], rows.shape[1]))


@torch.library.custom_op("plait::unpermute_rows_gradients", mutates_args=())
def unpermute_rows_gradients_op(
    grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute_rows`."""
    return _unpermute_gradients(grad, rows, order, weights)


@unpermute_rows_gradients_op.register_fake
def _(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


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


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of tokens and choices by expert, pairs of one expert by number; count each expert's.

    Pairs of expert number ``experts`` are nobody's: they come last and are not counted.

    Shape: index `[tokens, top_k]` (int64) -> order `[tokens * top_k]`, counts `[experts]`

    Raises:
        ValueError: an expert below 0 or above ``experts`` (seen on the CPU only).
    """
    if not direct(index):
        return sort_by_expert_reference(index, experts)
    flat = index.reshape(-1).numpy()
    order, counts = np.empty(len(flat), np.int64), np.zeros(experts + 1, np.int64)
    wrong = _sort(flat, order, counts)
    if wrong >= 0:
        token, choice = divmod(wrong, index.shape[1])
        raise ValueError(
            f"sort_by_expert: token {token} chose expert {flat[wrong]} (choice {choice}), "
            f"and there are {experts}; was the router's answer finite?"
        )
    return torch.from_numpy(order), torch.from_numpy(counts[:experts])


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


__all__ = ["permute_rows", "sort_by_expert", "unpermute_rows"]


# inlines halves.py 5f21b6c6
