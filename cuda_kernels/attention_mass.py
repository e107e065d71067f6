"""Attention that each key receives from some rows of queries, summed: what eviction scores by.

On the CPU one head's logits at a time stand in a buffer that is used again: the whole matrix, which a softmax of torch
would make and read several times, costs more in page faults than the products do.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .exp import exp_rows
from .kernel_cache import njit
from .merge import direct
from .workers import run_shares

MIN_SHARE = 1 << 16  # logits per thread


def attention_mass_reference(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Sum softmaxes in plain torch. Shape: as `attention_mass`"""
    logits = torch.einsum("hrd,htd->hrt", q * scale, k.to(q.dtype))
    hidden = torch.arange(k.shape[1], device=q.device) >= seen[:, None]
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(1)


@njit(nogil=True, error_model="numpy")
def _add_rows(logits, seen, out, first, stop):
    """Add the softmax of rows `[first, stop)` to `out`; logits become their exponentials."""
    for r in range(first, stop):
        row, n = logits[r], seen[r]
        top = row[0]
        for t in range(n):
            if row[t] > top or row[t] != row[t]:
                top = row[t]
        if not (-np.inf < top < np.inf):  # softmax of infinities and NaN is NaN
            for t in range(n):
                out[t] += row[0] * np.nan
            continue
        share = 1 / exp_rows(row, n, top)
        for t in range(n):
            out[t] += row[t] * share


def _mass_cpu(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    heads, rows, _ = q.shape
    tokens = k.shape[1]
    shares = max(1, min(rows, torch.get_num_threads(), rows * tokens // MIN_SHARE))
    out = torch.zeros(shares, heads, tokens, dtype=q.dtype)
    logits = torch.empty(rows, tokens, dtype=q.dtype)
    buffer, sums, ends = logits.numpy(), out.numpy(), seen.to(torch.int64).contiguous().numpy()
    scaled = q * scale
    for head in range(heads):
        torch.mm(scaled[head], k[head].to(q.dtype).T, out=logits)

        def share(i: int, head: int = head) -> None:
            _add_rows(buffer, ends, sums[i, head], rows * i // shares, rows * (i + 1) // shares)

        run_shares(share, shares)
    return out[0] if shares == 1 else out.sum(0)


@torch.library.custom_op("plait::attention_mass", mutates_args=())
def attention_mass_op(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Run it behind torch's dispatcher: Numba on CPU, torch elsewhere."""
    return (_mass_cpu if q.device.type == "cpu" else attention_mass_reference)(q, k, seen, scale)


@attention_mass_op.register_fake
def _(q, k, seen, scale):
    return q.new_empty(k.shape[:2])


def attention_mass(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Sum the attention weights of all rows of a head on each of its keys; row r sees the first `seen[r]` keys.

    Shape:
        q `[kv_heads, rows, head_dim]` float32 or float64, k `[kv_heads, tokens, head_dim]`,
        seen `[rows]`, each at least 1
        -> `[kv_heads, tokens]` of q's dtype

    Raises:
        ValueError: if the shapes do not belong together.
    """
    fits = q.dim() == 3 and k.dim() == 3 and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2])
    if not fits or seen.shape != q.shape[1:2]:
        raise ValueError(
            f"attention_mass: q {list(q.shape)}, k {list(k.shape)} and seen {list(seen.shape)} do not fit; "
            "use q [kv_heads, rows, head_dim], k [kv_heads, tokens, head_dim], seen [rows]"
        )
    call = _mass_cpu if direct(q) else torch.ops.plait.attention_mass
    return call(q.detach(), k.detach(), seen, scale)
