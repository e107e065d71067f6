"""The module of routed experts, after a plan has cut it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .capacity import Capacity
from .compute import Packed
from .dispatch import Experts, by_sums, by_tokens, to_owners
from .fssdp import Materialised, Materialiser
from .nodes import Nodes, to_nodes
from .place import Place
from .static import to_slots

if TYPE_CHECKING:
    from .beside import Beside
    from .joint import JointSum

Route = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
Local = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Compute(Protocol):
    """How a kind of module sends rows through its experts."""

    def rows(self, module: Any, x: Tensor, counts: list[int]) -> Tensor:
        """Send rows, sorted by expert, ``counts[e]`` for expert e of this rank, through its experts."""
        ...


@dataclass(frozen=True)
class Routed:
    """What a layer of routed experts knows of its plan."""

    place: Place
    compute: Compute
    sums: bool
    route: Route | None = None
    capacity: Capacity | None = None
    pad: bool = False
    nodes: Nodes | None = None
    joint: JointSum | None = None
    beside: Beside | None = None
    copies: Materialiser | None = None
    local: Local | None = None

    def send(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Bring tokens and experts together as the plan says.

        Shape: hidden [tokens, hidden], index (experts), weights [tokens, top_k] -> [tokens, hidden]
        """
        place, capacity = self.place, self.capacity

        def experts(x: Tensor, counts: list[int]) -> Tensor:
            return self.compute.rows(module, x, counts)

        if capacity is not None and self.pad:
            ranks = 1 if place.alike is None else place.alike.size
            most = -(-len(hidden) // ranks)
            way = partial(to_slots, capacity=capacity, most=most)
            return by_tokens(place, way, experts, hidden, index, weights)
        if capacity is not None:
            index = capacity.kept(index, weights, place.experts)
        if self.copies is not None and torch.is_grad_enabled():
            return self._with_copies(self.copies, module, hidden, index, weights)
        slots = place.homes.spread(index, place.turn)
        if self.sums:
            out = by_sums(place, experts, hidden, slots, weights)
            return place.sum(out) if self.joint is None else self.joint.leave(out)
        if self.nodes is not None:
            nodes = self.nodes
            return by_tokens(
                place, lambda _, *x: to_nodes(nodes, *x), experts, hidden, slots, weights
            )
        meanwhile = None if self.beside is None else self.beside.work()
        way = partial(to_owners, meanwhile=meanwhile)
        return by_tokens(place, way, experts, hidden, slots, weights)

    def _with_copies(
        self,
        copies: Materialiser,
        module: nn.Module,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Gather the copies that this step has, and send tokens to the nearest of them."""
        homes, near = copies.placement or copies.owned, self.place.along_ep.index
        place = replace(self.place, homes=homes)
        compute = self.compute
        assert isinstance(compute, Packed)
        experts: Experts = partial(compute.rows, module)
        if homes != copies.owned:
            experts = Materialised.start(module, compute, copies).rows

        def way(
            place: Place, experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor
        ) -> Tensor:
            # of the rank's own tokens: its own copies
            slots = homes.spread(index, place.turn, near)
            return to_owners(place, experts, hidden, slots, weights, note=copies.note)

        return by_tokens(place, way, experts, hidden, index, weights)


class ExpertLayer(nn.Module):
    """Routed experts of which this rank holds some.

    Shape: hidden [tokens, hidden], index and weights [tokens, top_k] -> [tokens, hidden]
    Collective: see `by_sums`, `to_owners`, `to_slots` and `to_nodes`.
    """

    _plait_experts: Routed

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        here = self._plait_experts
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = here.route(self, flat) if here.route is not None else [*args, *kwargs.values()]
        index, weights = (r.reshape(-1, r.shape[-1]) for r in routing)
        stays = None if here.local is None else here.local(self, flat, index, weights)
        if stays is not None:  # what is computed where the token is goes nowhere
            index = index.clamp(max=here.place.experts)
        out = here.send(self, flat, index, weights)
        return (out if stays is None else out + stays).view_as(hidden_states)

    def own_forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The module's own code, on this rank's experts."""
        return super().forward(x, index, weights)

    def extra_repr(self) -> str:
        place = self._plait_experts.place
        own = place.homes.ranks[place.along_ep.index]
        return f"experts {', '.join(map(str, own))} of {place.experts}"


@dataclass(frozen=True)
class OwnCode:
    """A module with stacked parameters whose own forward computes: each row has one expert, with weight 1."""

    def rows(self, module: Any, x: Tensor, counts: list[int]) -> Tensor:
        numbers = torch.arange(len(counts), device=x.device)
        index = numbers.repeat_interleave(torch.tensor(counts, device=x.device))
        out = module.own_forward(x, index[:, None], x.new_ones((x.shape[0], 1)))
        return out if x.shape[0] else in_graph(out, x, *module._parameters.values())


@dataclass(frozen=True)
class Listed:
    """Experts that are modules of their own; this rank runs those from ``first`` on."""

    path: str
    first: int

    def rows(self, module: Any, x: Tensor, counts: list[int]) -> Tensor:
        container = module.get_submodule(self.path)
        children = list(container.children())[self.first : self.first + len(counts)]
        # every expert runs, also on no rows: its parameters then have a gradient of zero, and no hook waits
        parts = [child(rows) for child, rows in zip(children, x.split(counts), strict=True)]
        return torch.cat(parts)


def in_graph(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """Make an output depend on every input, with gradients of zero."""
    for x in inputs:
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            out = out + x.sum().to(out.dtype) * 0
    return out
