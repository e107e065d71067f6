"""The k greatest of each row, exactly; of equal values the lowest index; with a hint of where they were last time.

Guess-Verify-Refine (arXiv 2604.22312) with its holes closed. Guess a threshold, from a sample of the row, on a GPU from
the values at the hint as well; verify in one pass that at least k and not too many values reach it, keeping them;
refine among these alone. Whatever was guessed, an answer is given only from candidates that contain it: when the
guesses fail, all values are candidates. The refinement is a radix select on the values' bits, whose time does not
depend on them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .gpu.kernel import run_on
from .gpu.toolchain import usable
from .halves import widen
from .kernel_cache import njit
from .merge import direct
from .numbers import flat
from .top_k_gpu import serves, top_k_launch
from .workers import run_shares

SAMPLE = 1024  # values looked at for a guess
SHORT = 4 * SAMPLE  # rows below this are all candidates
DIGIT = 11  # bits of one round of the radix select
MIN_SHARE_VALUES = 1 << 15  # per thread


def top_k_reference(x: Tensor, k: int) -> Tensor:
    """Sort whole rows in plain torch; NaN counts as the greatest. Shape: as `top_k`."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values


@njit(nogil=True, error_model="numpy")
def _key(value):
    """Whole numbers that are ordered as the values are; both zeros are one, NaN is above all."""
    wide = np.float64(widen(value)) + 0.0
    if wide != wide:
        return np.uint64(0xFFFFFFFFFFFFFFFF)
    bits = np.uint64(np.float64(wide).view(np.uint64))
    if bits >> np.uint64(63):
        return np.uint64(~bits)
    return np.uint64(bits | np.uint64(0x8000000000000000))


@njit(nogil=True, error_model="numpy")
def _greatest(keys, n, k, counts):
    """Give the k-th greatest of keys[:n], from the highest digit down; keys are shuffled away."""
    shift = 64
    while True:
        shift = max(0, shift - DIGIT)
        counts[:] = 0
        for i in range(n):
            counts[(keys[i] >> np.uint64(shift)) & np.uint64((1 << DIGIT) - 1)] += 1
        digit = counts.shape[0] - 1
        while counts[digit] < k:
            k -= counts[digit]
            digit -= 1
        left = 0
        for i in range(n):
            if (keys[i] >> np.uint64(shift)) & np.uint64((1 << DIGIT) - 1) == np.uint64(digit):
                keys[left] = keys[i]
                left += 1
        n = left
        if n == 1 or shift == 0:
            return keys[0]


@njit(nogil=True, error_model="numpy")
def _kth_of(x, where, n, k, keys, counts):
    """Give where[j] of the k-th greatest of x[where[:n]]."""
    for j in range(n):
        keys[j] = _key(x[where[j]])
    kth = _greatest(keys, n, k, counts)
    for j in range(n):
        if _key(x[where[j]]) == kth:
            return where[j]
    return where[0]


@njit(nogil=True, error_model="numpy")
def _guess(x, k, margin, where, keys, counts):
    """Give the place of a value that k others likely reach, by one value of each of SAMPLE runs of the row."""
    n = x.shape[0]
    odd = np.int64(12345)
    for j in range(SAMPLE):
        first, stop = n * j // SAMPLE, n * (j + 1) // SAMPLE
        odd = (odd * 1103515245 + 12345) & 0x7FFFFFFF
        where[j] = first + (odd >> 8) % (stop - first)
    share = k * SAMPLE / n
    rank = np.int64(share + margin * np.sqrt(share) + 2)
    # np.int64: a literal is a type of its own, for which all would be compiled once more
    return _kth_of(x, where, np.int64(SAMPLE), min(rank, SAMPLE), keys, counts)


@njit(nogil=True, error_model="numpy")
def _reaching(x, least, k, room, where):
    """Note where values exceed `least`, and where the first k equal it; stop at more than `room`."""
    count, equal = 0, 0
    for j in range(x.shape[0]):
        wide = widen(x[j])
        if not (wide < least):
            if wide == least:
                if equal == k:
                    continue
                equal += 1
            if count == room:
                return room + 1
            where[count] = j
            count += 1
    return count


@njit(nogil=True, error_model="numpy")
def _candidates(x, k, where, keys, counts):
    """Fill `where` with a few places that contain the k greatest, ascending; give their number, 0 if none is found."""
    room = where.shape[0]
    for margin in (3, 9):  # standard deviations of how many of a sample are among the k greatest
        place = _guess(x, k, margin, where, keys, counts)
        if widen(x[place]) == widen(x[place]):  # nothing is less than NaN
            count = _reaching(x, widen(x[place]), k, room, where)
            if k <= count <= room:
                return count
    return 0


@njit(nogil=True, error_model="numpy")
def _row(x, k, out):
    n = x.shape[0]
    counts = np.empty(1 << DIGIT, np.int64)
    count, room = 0, min(max(8 * k, SHORT), n)
    where, keys = np.empty(room, np.int64), np.empty(room, np.uint64)
    if n >= SHORT and 4 * k <= n:
        count = _candidates(x, k, where, keys, counts)
    if count == 0:
        count = n
        where, keys = np.arange(n), np.empty(n, np.uint64)
    for j in range(count):
        keys[j] = _key(x[where[j]])
    kth = _greatest(keys, count, k, counts)
    ties = k
    for j in range(count):
        ties -= _key(x[where[j]]) > kth
    done = 0
    for j in range(count):
        key = _key(x[where[j]])
        if key > kth or (key == kth and ties > 0):
            ties -= key == kth
            out[done] = where[j]
            done += 1


@njit(nogil=True, error_model="numpy")
def _rows(x, k, out, first, stop, width):
    """Rows `[first, stop)` of x, which lie end to end."""
    for r in range(first, stop):
        _row(x[r * width : (r + 1) * width], k, out[r])


def _top_k_cpu(x: Tensor, k: int) -> Tensor:
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    out = torch.empty(*x.shape[:-1], k, dtype=torch.int64)
    if k == 0 or rows == 0:
        return out
    values, into = flat(x.detach().contiguous()), out.view(rows, k).numpy()
    shares = max(1, min(rows, torch.get_num_threads(), x.numel() // MIN_SHARE_VALUES))

    def share(i: int) -> None:
        _rows(values, k, into, rows * i // shares, rows * (i + 1) // shares, width)

    run_shares(share, shares)
    return out


@torch.library.custom_op("plait::top_k", mutates_args=())
def top_k_op(x: Tensor, k: int, hint: Tensor | None) -> Tensor:
    """Run it behind torch's dispatcher: Numba on CPU, `top_k_gpu.py` on CUDA, a stable sort elsewhere."""
    return _top_k_cpu(x, k) if x.device.type == "cpu" else top_k_reference(x, k)


@top_k_op.register_kernel("cuda")
def _(x: Tensor, k: int, hint: Tensor | None) -> Tensor:
    if not (serves(x, k) and usable()):
        return top_k_reference(x, k)
    x, out = x.contiguous(), x.new_empty(*x.shape[:-1], k, dtype=torch.int64)
    held = None if hint is None else hint.to(x.device, torch.int64).contiguous()
    run_on(top_k_launch(x, k, held, out), x)
    return out


@top_k_op.register_fake
def _(x, k, hint):
    return x.new_empty(*x.shape[:-1], k, dtype=torch.int64)


def top_k(x: Tensor, k: int, hint: Tensor | None = None) -> Tensor:
    """Give the places of the k greatest values of each row, ascending.

    Exact whatever the hint: of equal values the lowest indices are given, -0.0 equals 0.0, NaN is the greatest.

    Args:
        hint: where the greatest are likely to be, such as the answer for the row before; places may repeat, and those
            outside the row are passed over. A CPU does not look: a sample guesses closer, and costs as little.

    Shape: x `[..., n]` float, hint `[..., any]` -> `[..., k]` int64

    Raises:
        ValueError: if k is negative or greater than n, x is not floating, or the hint has other rows.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"top_k: x {list(x.shape)} {x.dtype}; use [..., n] of a floating dtype")
    if not 0 <= k <= x.shape[-1]:
        raise ValueError(f"top_k: k={k} of rows of {x.shape[-1]} values; use 0 to {x.shape[-1]}")
    if hint is not None and (hint.is_floating_point() or hint.dim() == 0):
        raise ValueError(f"top_k: hint {list(hint.shape)} {hint.dtype}; use places [..., any]")
    if hint is not None and hint.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"top_k: hint {list(hint.shape)} must have the rows of x {list(x.shape)}")
    return _top_k_cpu(x, k) if direct(x) else torch.ops.plait.top_k(x, k, hint)
