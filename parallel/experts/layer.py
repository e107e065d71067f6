"""The module of routed experts, after a plan has cut it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .capacity import Capacity
from .dispatch import by_sums, by_tokens
from .place import Place

if TYPE_CHECKING:
    from .joint import JointSum

Route = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


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
    joint: JointSum | None = None


class ExpertLayer(nn.Module):
    """Routed experts of which this rank holds some.

    Shape: hidden [tokens, hidden], index and weights [tokens, top_k] -> [tokens, hidden]
    Collective: see `by_sums` and `by_tokens`.
    """

    _plait_experts: Routed

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        here = self._plait_experts
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = here.route(self, flat) if here.route is not None else [*args, *kwargs.values()]
        index, weights = (r.reshape(-1, r.shape[-1]) for r in routing)
        if here.capacity is not None:
            index = here.capacity.kept(index, weights, here.place.experts)
        index = here.place.homes.spread(index, here.place.turn)

        def experts(x: Tensor, counts: list[int]) -> Tensor:
            return here.compute.rows(self, x, counts)

        exchange = by_sums if here.sums else by_tokens
        out = exchange(here.place, experts, flat, index, weights)
        if here.sums:
            out = here.place.sum(out) if here.joint is None else here.joint.leave(out)
        return out.view_as(hidden_states)

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
