"""What happens to a score besides the dot product: scale, soft cap, ALiBi, visible range.

The rules live here once, so that the paged and the dense attention cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Interleave:
    """The position rule of a sequence cut over `shards` in runs of `run` tokens.

    Local index i of shard `shard` holds global position
    `(i // run) * run * shards + shard * run + i % run`. The default is an uncut sequence.

    Source: Helix Parallelism section 2.3; research on DCP layouts uses the same rule.
    """

    run: int = 1
    shards: int = 1
    shard: int = 0

    def __post_init__(self) -> None:
        if self.run < 1 or self.shards < 1 or not 0 <= self.shard < self.shards:
            raise ValueError(
                f"Interleave(run={self.run}, shards={self.shards}, shard={self.shard}): "
                "run and shards must be at least 1 and 0 <= shard < shards"
            )

    def positions(self, index: Tensor) -> Tensor:
        """Map local key indices to global positions."""
        turn = index // self.run
        return turn * (self.run * self.shards) + self.shard * self.run + index % self.run

    def local_length(self, length: int) -> int:
        """Count the tokens of a global `length` that this shard holds."""
        base = length // (self.run * self.shards) * self.run
        rest = length - base * self.shards - self.shard * self.run
        return base + min(max(rest, 0), self.run)


def adjust_scores(
    scores: Tensor,
    index: Tensor,
    lo: Tensor,
    hi: Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    q_pos: Tensor | None,
    interleave: Interleave,
) -> Tensor:
    """Apply soft cap, ALiBi and the visible range to scaled scores.

    Shape: scores `[heads, rows, tokens]`, index `[tokens]` (local key index), lo, hi, q_pos `[rows]`.
    """
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        if q_pos is None:
            raise ValueError("ALiBi needs q_pos, the global position of each query row")
        away = interleave.positions(index)[None, :] - q_pos[:, None]
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * away.to(scores.dtype)
    hidden = (index[None, :] < lo[:, None]) | (index[None, :] >= hi[:, None])
    return scores.masked_fill(hidden, NEG_INF)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    q_pos: Tensor | None = None,
    interleave: Interleave | None = None,
    sink: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend in plain torch, differentiable in every float input; the oracle of all kernels.

    `k` and `v` hold keys `[first, first + tokens)` of the sequence; `lo` and `hi` count from 0.

    Shape:
        q `[rows, heads, head_dim]`, k `[tokens, kv_heads, head_dim]`,
        v `[tokens, kv_heads, value_dim]` -> o `[rows, heads, value_dim]`, lse `[rows, heads]`
    """
    rows, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(work).reshape(rows, kv_heads, heads // kv_heads, q.shape[-1])
    if rows == 0:
        return q.new_zeros(0, heads, v.shape[-1]), q.new_zeros(0, heads, dtype=work)
    scores = torch.einsum("rkgd,tkd->kgrt", grouped, k.to(work)) * scale
    index = torch.arange(first, first + tokens, device=q.device)
    scores = adjust_scores(
        scores.reshape(heads, rows, tokens),
        index, lo, hi, softcap, alibi_slopes, q_pos, interleave or Interleave(),
    )  # fmt: skip
    if sink is not None:  # one more column that carries no value: counted exactly once
        column = sink.to(work)[:, None, None].expand(heads, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    elif tokens == 0:
        return q.new_zeros(rows, heads, v.shape[-1]), q.new_full((rows, heads), NEG_INF, dtype=work)
    with torch.no_grad():
        top = scores.amax(-1, keepdim=True)
        top = torch.where(top == NEG_INF, torch.zeros_like(top), top)
    weight = torch.exp(scores - top)
    total = weight.sum(-1, keepdim=True)
    none = total == 0
    total = torch.where(none, torch.ones_like(total), total)
    lse = torch.where(none, torch.full_like(top, NEG_INF), top + torch.log(total))
    prob = (weight / total)[..., :tokens].reshape(kv_heads, heads // kv_heads, rows, tokens)
    o = torch.einsum("kgrt,tkd->rkgd", prob, v.to(work)).reshape(rows, heads, v.shape[-1])
    return o.to(q.dtype), lse.squeeze(-1).T


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor,
    alibi_slopes: Tensor | None, q_pos: Tensor | None,
) -> None:  # fmt: skip
    """Refuse shapes that do not belong together."""
    if q.dim() != 3 or k.shape[-1] != q.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit; "
            "use q [rows, heads, head_dim], k [..., kv_heads, head_dim], v [..., kv_heads, value_dim]"
        )
    if q.shape[1] % k.shape[-2]:
        raise ValueError(
            f"attention: {q.shape[1]} heads are not a multiple of {k.shape[-2]} kv_heads"
        )
    if lo.shape != q.shape[:1] or hi.shape != q.shape[:1]:
        raise ValueError(
            f"attention: bounds lo {list(lo.shape)}, hi {list(hi.shape)} must be [rows={q.shape[0]}]"
        )
    if alibi_slopes is not None and (q_pos is None or q_pos.shape != q.shape[:1]):
        raise ValueError(
            "attention: ALiBi needs q_pos [rows], the global position of each query row"
        )
