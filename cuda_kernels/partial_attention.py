"""Attention of some query rows over some of their keys, forward and backward: one step of ring attention.

The backward takes the output and lse *after* the merge over all keys: with those, the probabilities of these keys,
and so the gradients through them, are exact parts of the whole (FlashAttention's backward, arXiv 2205.14135).
On the CPU torch's flash operators compute both; soft caps and other devices go by matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = float("-inf")


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attend to these keys only; a row that sees none gives ``o = 0, lse = -inf``.

    Shape:
        q ``[batch, heads, rows, head_dim]``, k ``[batch, kv_heads, keys, head_dim]``, v ``[.., value_dim]``,
        mask ``[batch or 1, 1, rows, keys]``, true where a row sees a key
        -> o ``[batch, heads, rows, value_dim]``, lse ``[batch, heads, rows]`` (natural log; float64 for float64,
        else float32)
    """
    if q.device.type != "cpu" or softcap > 0:
        return _by_products(q, k, v, scale, mask, softcap)
    width = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    bias = None if mask is None else _bias(mask, q.dtype)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )
    if mask is not None:  # the operator answers lse = 0 where a row sees nothing
        lse = lse.masked_fill(~mask.any(-1), NEG_INF)
    return o[..., :width], lse


def partial_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    mask: Tensor | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate attention through these keys, given ``o`` and ``lse`` over all keys; lse must be finite.

    Shape: grad, o ``[batch, heads, rows, value_dim]``, lse ``[batch, heads, rows]``, others as in
        `partial_attention` -> gradients of q, k, v
    """
    if q.device.type != "cpu" or softcap > 0:
        return _backward_by_products(grad, q, k, v, o, lse, scale, mask, softcap)
    wide, width = q.shape[-1], v.shape[-1]
    grad, o = _one_width(grad, o, width=max(wide, width))
    q, k, v = _one_width(q, k, v)
    bias = None if mask is None else _bias(mask, q.dtype)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, o, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    return dq[..., :wide], dk[..., :wide], dv[..., :width]


def merge_into(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a partial into a running one, in place; see `merge_states` for what it computes.

    Shape: o, part ``[..., value_dim]``, lse, part_lse ``[...]``
    """
    both = torch.logaddexp(lse, part_lse)
    top = both.masked_fill(both == NEG_INF, 0.0)
    o.mul_(torch.exp(lse - top).unsqueeze(-1))
    o.addcmul_(part.to(o.dtype), torch.exp(part_lse - top).unsqueeze(-1))
    lse.copy_(both)


def _one_width(*tensors: Tensor, width: int = 0) -> list[Tensor]:
    """Pad the last dims with zeros to one width, dense: the flash operator takes them for both without looking."""
    width = width or max(t.shape[-1] for t in tensors)
    dense = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    return [t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in dense]


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, NEG_INF)


def _scores(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped and masked scores, and what the cap multiplies their gradients with.

    Shape: q ``[batch, kv_heads, group, rows, d]``, k ``[batch, kv_heads, keys, d]``
        -> ``[batch, kv_heads, group, rows, keys]``
    """
    scores = torch.einsum("bkgrd,bktd->bkgrt", q, k) * scale
    slope = None
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), NEG_INF)
    return scores, slope


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).unflatten(1, (kv_heads, -1))


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = _grouped(q, k.shape[1], work)
    scores, _ = _scores(grouped, k.to(work), scale, mask, softcap)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == NEG_INF, 0.0).unsqueeze(-1))
    o = torch.einsum("bkgrt,bktd->bkgrd", weights, v.to(work))
    return o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _backward_by_products(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    mask: Tensor | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    work, heads = lse.dtype, k.shape[1]
    queries, keys, values = _grouped(q, heads, work), k.to(work), v.to(work)
    scores, slope = _scores(queries, keys, scale, mask, softcap)
    weights = torch.exp(scores - _grouped(lse, heads, work).unsqueeze(-1))
    out, given = _grouped(o, heads, work), _grouped(grad, heads, work)
    dv = torch.einsum("bkgrt,bkgrd->bktd", weights, given)
    delta = (out * given).sum(-1, keepdim=True)
    ds = weights * (torch.einsum("bkgrd,bktd->bkgrt", given, values) - delta) * scale
    if slope is not None:
        ds = ds * slope
    dq = torch.einsum("bkgrt,bktd->bkgrd", ds, keys).flatten(1, 2)
    dk = torch.einsum("bkgrt,bkgrd->bktd", ds, queries)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


__all__ = ["merge_into", "partial_attention", "partial_attention_backward"]
