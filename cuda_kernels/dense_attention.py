"""Attention of many query rows over one sequence's contiguous keys, with lse (prefill).

Row r sees the keys `[lo[r], hi[r])` by index. Rows are taken in chunks so that only keys below
a chunk's largest bound are read, and a mask is built only for the keys that some rows of the
chunk see and others do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .merge import merge_states_reference
from .scores import Interleave, attention_reference, check_attention

CHUNK_ROWS = 256  # query rows per flash call: bounds the mask and the waste at the diagonal
WORKSPACE_BYTES = 256 << 20  # scores and masks alive at once never take more
FEW = 16  # keys, fewer than which torch's operator gives zeros where all scores of a row are NaN


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Call torch's CPU flash operator (GQA, natural-log lse) on `[tokens, heads, d]` tensors."""
    if k.shape[0] < FEW:
        return _few(q, k, v, scale, mask, causal)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        0.0, causal, attn_mask=mask, scale=scale,
    )  # fmt: skip
    return o[0].transpose(0, 1), lse[0].T


def _few(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Do what `_flash` does by torch math."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("rhd,thd->hrt", q.to(wide) * scale, keys)
    if causal:
        mask = torch.full(scores.shape[1:], float("-inf")).triu_(1)
    scores = scores if mask is None else scores + mask
    o = torch.einsum("hrt,thd->rhd", scores.softmax(-1), values)
    return o.to(q.dtype), scores.logsumexp(-1).T


def _edge(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, first: int, stop: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to keys `[first, stop)` that only some rows see; also say which rows see none."""
    index = torch.arange(first, stop)
    empty = torch.minimum(hi, torch.tensor(stop)) <= torch.clamp(lo, min=first)
    rows = q.shape[0]
    stairs = torch.arange(first + 1, first + rows + 1)
    if stop - first == rows and bool((lo <= first).all()) and torch.equal(hi, stairs):
        return *_flash(q, k[first:stop], v[first:stop], scale, causal=True), empty
    seen = (index >= lo[:, None]) & (index < hi[:, None])
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    return *_flash(q, k[first:stop], v[first:stop], scale, mask), empty


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend for one chunk of rows: keys seen by all without a mask, the two edges with one."""
    first, last_lo = int(lo.min()), int(lo.max())
    first_hi, stop = int(hi.min()), int(hi.max())
    outs, lses, empties = [], [], []
    if first_hi > last_lo:
        o, lse = _flash(q, k[last_lo:first_hi], v[last_lo:first_hi], scale)
        outs, lses = [o], [lse]
        empties = [torch.zeros(q.shape[0], dtype=torch.bool)]
        edges = [(first, last_lo), (first_hi, stop)]
    else:
        edges = [(first, stop)]
    widest = max(1, WORKSPACE_BYTES // (2 * q.shape[0] * q.element_size()))
    for a, b in edges:
        for c in range(a, b, widest):
            o, lse, empty = _edge(q, k, v, lo, hi, c, min(c + widest, b), scale)
            outs, lses, empties = [*outs, o], [*lses, lse], [*empties, empty]
    if not outs:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), _lse_like(q).fill_(float("-inf"))
    if len(outs) == 1 and not bool(empties[0].any()):
        return outs[0], lses[0]
    return merge_states_reference(torch.stack(outs), torch.stack(lses), empty=torch.stack(empties))


def _lse_like(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape[0], q.shape[1], dtype=dtype, device=q.device)


def _math_chunked(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, interleave: Interleave,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend by torch math within the workspace: the path of soft cap, ALiBi and other devices."""
    tokens, heads = k.shape[0], q.shape[1]
    o, lse = q.new_empty(*q.shape[:2], v.shape[-1]), _lse_like(q)
    budget = WORKSPACE_BYTES // (4 * heads * lse.element_size())  # row * token cells per call
    rows_per = max(1, min(q.shape[0], budget // max(1, min(tokens, 4096))))
    keys_per = max(1, budget // rows_per)
    for r in range(0, q.shape[0], rows_per):
        rows = slice(r, r + rows_per)
        first, stop = max(0, int(lo[rows].min())), min(tokens, int(hi[rows].max()))
        parts = [
            attention_reference(
                q[rows], k[c : min(c + keys_per, stop)], v[c : min(c + keys_per, stop)],
                lo[rows], hi[rows], scale, softcap, alibi_slopes,
                None if q_pos is None else q_pos[rows], interleave, first=c,
            )
            for c in range(first, stop, keys_per)
        ]  # fmt: skip
        if not parts:
            o[rows], lse[rows] = 0.0, float("-inf")
            continue
        merged = merge_states_reference(
            torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        )
        o[rows], lse[rows] = merged
    return o, lse


@torch.library.custom_op("plait::dense_attention", mutates_args=())
def dense_attention_op(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float,
    alibi_slopes: Tensor | None, q_pos: Tensor | None, run: int, shards: int, shard: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run bounded attention without autograd; on CPU through torch's flash operator."""
    lo, hi = lo.clamp(min=0), hi.clamp(max=k.shape[0])
    if q.device.type != "cpu" or softcap > 0 or alibi_slopes is not None:
        rule = Interleave(run, shards, shard)
        return _math_chunked(q, k, v, lo, hi, scale, softcap, alibi_slopes, q_pos, rule)
    # the flash operator takes the last dim for dense without looking
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    value_dim = v.shape[-1]
    if value_dim != q.shape[-1]:  # the flash operator wants one head size: pad with zeros
        wide = max(value_dim, q.shape[-1])
        q, k, v = (F.pad(t, (0, wide - t.shape[-1])) for t in (q, k, v))
    o, lse = q.new_empty(q.shape), _lse_like(q)
    for r in range(0, q.shape[0], CHUNK_ROWS):
        rows = slice(r, r + CHUNK_ROWS)
        o[rows], lse[rows] = _chunk(q[rows], k, v, lo[rows], hi[rows], scale)
    return o[..., :value_dim].contiguous(), lse


@dense_attention_op.register_fake
def _(q, k, v, lo, hi, scale, softcap, alibi_slopes, q_pos, run, shards, shard):
    return q.new_empty(*q.shape[:2], v.shape[-1]), _lse_like(q)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    q_pos: Tensor | None = None,
    interleave: Interleave | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with many rows to one contiguous sequence; return output and natural-log lse.

    Row r sees keys `[lo[r], hi[r])` by index; a row that sees none gives `o = 0, lse = -inf`.
    `softcap` caps scores by `softcap * tanh(score / softcap)`. ALiBi adds
    `slope * (key position - q_pos)`, the key position by `interleave`. `sink` is one logit per
    head in the denominator, and then in lse: give it on one shard only, or to `merge_states`.

    Differentiable (through o and lse) when an input requires grad, by plain torch math with
    `heads * rows * tokens` scores; otherwise at most `WORKSPACE_BYTES` of scores at once.

    Shape:
        q `[rows, heads, head_dim]`, k `[tokens, kv_heads, head_dim]`,
        v `[tokens, kv_heads, value_dim]`, lo, hi, q_pos `[rows]` int64
        -> o `[rows, heads, value_dim]`, lse `[rows, heads]` (float32; float64 for float64)

    Raises:
        ValueError: if shapes do not belong together, or ALiBi lacks `q_pos`.
    """
    check_attention(q, k, v, lo, hi, alibi_slopes, q_pos)
    rule, cap = interleave or Interleave(), float(softcap or 0.0)
    floats = [t for t in (q, k, v, sink, alibi_slopes) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in floats):
        return attention_reference(q, k, v, lo, hi, scale, cap, alibi_slopes, q_pos, rule, sink)
    o, lse = torch.ops.plait.dense_attention(
        q, k, v, lo, hi, scale, cap, alibi_slopes, q_pos, rule.run, rule.shards, rule.shard
    )
    if sink is not None:
        return merge_states_reference(o[None], lse[None], sink)
    return o, lse
