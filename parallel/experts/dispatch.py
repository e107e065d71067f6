"""How tokens and experts come together: rows travel, or only results do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...collectives import autograd
from ...collectives.primitive import chunk_sizes
from ...collectives.token_exchange import TokenExchange, counted, tell_counts
from ...cuda_kernels import permute_rows, unpermute_rows
from .place import Place
from .route import Assignment, by_expert, inverse

Experts = Callable[[Tensor, list[int]], Tensor]
Way = Callable[[Place, Experts, Tensor, Tensor, Tensor], Tensor]


def by_sums(
    place: Place, experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Let every rank send the tokens it shares with the others through its experts; the results are to be summed.

    Ranks that hold the same experts take different tokens.

    Shape: hidden [tokens, hidden], index (slots), weights [tokens, top_k] -> [tokens, hidden], this rank's part
    Collective: the ranks that bring the same tokens; the caller's all-reduce of the output forward, one of the
        gradients of ``hidden`` and ``weights`` backward. Shapes do not depend on the routing, the host reads this
        rank's counts.
    Source: Helix Parallelism section 2.2 (no dispatch where all ranks have all tokens).
    """
    assert place.alike is not None
    tokens, top_k = index.shape
    hidden, weights = autograd.enter_rows(place.alike.all, hidden, weights)
    share, shares = place.shares
    sizes = chunk_sizes(tokens, shares)
    start = sum(sizes[:share])
    mine = Assignment.of(index[start : start + sizes[share]], place.homes.slots)
    counts = mine.counts.tolist()
    last = place.first + place.held
    pairs = mine.kept(place.first, last, counts) + start * top_k
    out = experts(permute_rows(hidden, pairs, top_k), counts[place.first : last])
    return unpermute_rows(out, pairs, weights).to(hidden.dtype)


def by_tokens(
    place: Place, way: Way, experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Share the tokens out over the ranks that bring the same, send each rank's own some way, and gather the output.

    Shape: hidden [tokens, hidden], index, weights [tokens, top_k] -> [tokens, hidden]
    Collective: those ranks; one all-gather of the output forward and one of the gradients of ``hidden`` and ``weights``
        backward; and what the way says.
    """
    if place.alike is None:
        return way(place, experts, hidden, index, weights)
    group, sizes = place.alike.all, chunk_sizes(hidden.shape[0], place.alike.size)
    index = autograd.own_part(index, group, 0, sizes)
    hidden, weights = autograd.split_rows(group, hidden, weights)
    return autograd.gather(way(place, experts, hidden, index, weights), group, 0, sizes)


def to_owners(
    place: Place,
    experts: Experts,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    meanwhile: Callable[[], None] | None = None,
    note: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Send every token to the ranks of its experts and bring the results back; weights are applied where it came from.

    permute -> exchange -> (source, expert) to (expert, source) -> experts, and each step's inverse on the way back.
    Under etp a row is sent to each rank that holds a slice of its expert, and their partial results are summed when
    they are back: the bytes of an exchange over ep and a gather over etp, in one round.

    Args:
        meanwhile: what to compute while rows are on their way there.
        note: is told the rows that each owner has for each slot, [owners, slots].
    Shape: hidden [tokens, hidden], index (slots), weights [tokens, top_k] -> [tokens, hidden]
    Collective: among owners an all-gather of counts, and an all-to-all of rows there and back, each way also backward.
        Sent by each rank, in rows: 2 * tokens * top_k * (etp - 1/ep).
    Source: MoE Parallel Folding (arXiv 2504.14960) section 3.3.
    """
    exchange, received, sent = meet(place, index, note)
    rows = exchange.there(permute_rows(hidden, sent, index.shape[1]), meanwhile)
    order = by_expert(received).to(rows.device)
    out = experts(rows.index_select(0, order), received.sum(0).tolist())
    returned = exchange.back(out.index_select(0, inverse(order)))
    return unpermute_rows(returned, sent, weights).to(hidden.dtype)


def meet(
    place: Place, index: Tensor, note: Callable[[Tensor], None] | None = None
) -> tuple[TokenExchange, Tensor, Tensor]:
    """Agree on who sends what.

    Returns:
        The exchange; the rows this rank receives, [owners, held experts]; and the pair of every row it sends, in order.
    """
    mine = Assignment.of(index, place.homes.slots)
    every = tell_counts(mine.counts, place.owners.all)
    if index.device.type == "meta":  # a run for its collectives: all ranks are taken to be alike
        every = mine.counts.expand(place.owners.size, -1)
    if note is not None:
        note(every)
    by_rank = [part.sum(1) for part in every.split(list(place.homes.sizes), 1)]
    by_owner = torch.stack(by_rank, 1).repeat_interleave(place.etp, 1)
    exchange = counted(place.owners.all, by_owner.tolist())
    received = every[:, place.first : place.first + place.held]
    rows = exchange.send[:: place.etp]
    kept = mine.order[: sum(rows)]
    if place.etp == 1:
        return exchange, received, kept
    blocks = kept.split(list(rows))
    return exchange, received, torch.cat([block for b in blocks for block in (b,) * place.etp])
