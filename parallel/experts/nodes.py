"""Dispatch over two kinds of links: a token crosses to another node once, however many of its experts are there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ...collectives.primitive import Group
from ...collectives.token_exchange import counted, tell_counts
from ..errors import PlanError
from ..ranks import Holders
from .dispatch import Experts, to_owners
from .place import Place
from .placement import Placement


@dataclass(frozen=True)
class Nodes:
    """The owners of the experts, as nodes of equally many ranks.

    Attributes:
        group: the ranks with this one's number on their nodes, in order of nodes.
        near: this rank's place among the owners of its own node.
        starts: the first slot of each node, and the number of all slots.
    """

    group: Group
    near: Place
    starts: tuple[int, ...]

    @classmethod
    def of(cls, place: Place, count: int) -> Nodes:
        """Cut the owners into so many nodes; they are in order of ranks.

        Raises:
            PlanError: they cannot be cut so, or an expert's ranks would lie on two nodes.
        """
        owners, ep = place.owners, place.along_ep
        if ep.size % count:
            because = f"does not divide ep={ep.size}, whose ranks are to lie on them evenly"
            raise PlanError(f"nodes={count}", because, f"use a divisor of {ep.size}")
        width, per = owners.size // count, ep.size // count
        mine = owners.index // width
        sizes = place.homes.sizes
        starts = tuple(sum(sizes[: n * per]) for n in range(count + 1))
        held = sizes[mine * per : (mine + 1) * per]
        ends = [sum(held[:r]) for r in range(per + 1)]
        runs = tuple(tuple(range(a, b)) for a, b in pairwise(ends))
        near = replace(
            place,
            along_ep=_part(ep, mine * per, per),
            owners=_part(owners, mine * width, width),
            alike=None,
            homes=Placement(sum(held), runs),
        )
        across = tuple(owners.members[owners.index % width + n * width] for n in range(count))
        return cls(owners.groups.of_ranks(across), near, starts)

    @property
    def here(self) -> int:
        """This rank's node."""
        return 0 if self.group is None else self.group.rank()


def _part(holders: Holders, start: int, size: int) -> Holders:
    members = holders.members[start : start + size]
    order = tuple(range(size))
    return Holders(holders.groups, holders.axes, members, holders.index - start, order)


def to_nodes(
    nodes: Nodes, experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Send every token once to each node that holds experts of it; there it goes on to their ranks.

    Weights travel along: what comes back from a node is one row for each token, the weighted sum of its experts.

    Shape: hidden [tokens, hidden], index (slots), weights [tokens, top_k] -> [tokens, hidden]
    Collective: the ranks of one number on all nodes, an all-gather of counts and all-to-alls of rows, weights and slots
        there and of rows back; on the node what `to_owners` says. Rows that leave a node: at most one there and one
        back for each pair of a token and another node.
    Source: MoE Parallel Folding's hierarchical exchange; DeepSeek-V3 (arXiv 2412.19437) section 3.2.2.
    """
    count, top_k = len(nodes.starts) - 1, index.shape[1]
    node_of = torch.tensor(
        [n for n, (a, b) in enumerate(pairwise(nodes.starts)) for _ in range(b - a)]
        + [count],
        device=index.device,
    )  # fmt: skip
    wanted = torch.zeros(len(index), count + 1, dtype=torch.bool, device=index.device)
    wanted = wanted.scatter(1, node_of[index], True)[:, :count]
    if index.device.type == "meta":  # a run for its collectives: every token has experts everywhere
        wanted = torch.ones(len(index), count, dtype=torch.bool)
    token = wanted.t().nonzero()[:, 1].to(index.device)
    table = tell_counts(wanted.sum(0), nodes.group)
    exchange = counted(nodes.group, table.tolist())
    rows = exchange.there(hidden.index_select(0, token))
    share = exchange.there(weights.index_select(0, token))
    slots = exchange.there(index.index_select(0, token).to(torch.int32)).long()
    first, last = nodes.starts[nodes.here], nodes.starts[nodes.here + 1]
    slots = torch.where((slots >= first) & (slots < last), slots - first, last - first)
    out = exchange.back(to_owners(nodes.near, experts, rows, slots.view(-1, top_k), share))
    return torch.zeros_like(hidden).index_add(0, token, out)
