"""Ulysses: heads and sequence change places over the ranks of a group, before attention and after it.

Source: DeepSpeed Ulysses (arXiv 2309.14509). Between the two exchanges a rank holds all tokens of the group for its
run of the query heads. With fewer KV heads than ranks, the ranks whose query heads read one KV head each get a copy;
the gradients of the copies are summed where they came from, by the exchange back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...collectives import autograd
from ...collectives.primitive import Group
from ..attention.heads import kv_run


def key_heads(heads: int, kv_heads: int, ranks: int) -> list[int] | None:
    """The KV heads to send, rank after rank, the same number to each; None if no equal number serves them.

    >>> key_heads(8, 4, 2), key_heads(8, 2, 4), key_heads(12, 4, 6)
    ([0, 1, 2, 3], [0, 0, 1, 1], None)
    """
    if kv_heads % ranks and ranks % kv_heads:
        return None
    return [head for rank in range(ranks) for head in range(*kv_run(heads, kv_heads, ranks, rank))]


def to_heads(x: Tensor, group: Group, counts: Sequence[int]) -> Tensor:
    """Give each rank its run of heads of all tokens of the group. The inverse of `to_tokens`.

    Shape: ``[batch, heads, counts[rank], d] -> [batch, heads/ranks, sum(counts), d]``
    Collective: all ranks of the group; one all-to-all, backward another.
    """
    if group is None:
        return x
    ranks, own = group.size(), counts[group.rank()]
    batch, heads, _, width = x.shape
    share = heads // ranks
    rows = x.permute(1, 2, 0, 3).reshape(heads * own, batch * width)  # heads outermost: runs
    received = autograd.all_to_all(rows, group, [share * own] * ranks, [share * n for n in counts])
    parts = received.split([share * n for n in counts])
    whole = torch.cat(
        [p.view(share, n, batch, width) for p, n in zip(parts, counts, strict=True)], 1
    )
    return whole.permute(2, 0, 1, 3)


def to_tokens(x: Tensor, group: Group, counts: Sequence[int]) -> Tensor:
    """Give each rank its own tokens of all heads. The inverse of `to_heads`.

    Shape: ``[batch, heads/ranks, sum(counts), d] -> [batch, heads, counts[rank], d]``
    Collective: all ranks of the group; one all-to-all, backward another.
    """
    if group is None:
        return x
    ranks, own = group.size(), counts[group.rank()]
    batch, share, _, width = x.shape
    by_token = x.permute(2, 1, 0, 3)  # tokens outermost: runs of the ranks
    rows = by_token.reshape(-1, batch * width)
    received = autograd.all_to_all(rows, group, [share * n for n in counts], [share * own] * ranks)
    back = received.view(ranks, own, share, batch, width)
    return back.permute(3, 0, 2, 1, 4).reshape(batch, ranks * share, own, width)


__all__ = ["key_heads", "to_heads", "to_tokens"]
