"""The shared expert computes while tokens are on their way to the routed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...collectives.trace import span
from ..edits import Edit, SetAttribute, SwapClass

NAMES = ("shared_experts", "shared_expert")


@dataclass
class Beside:
    """What a block, its routed experts and its shared expert share while one forward runs.

    Whether the shared expert may run early is seen, not assumed: a forward has shown that the block calls it after the
    routed experts, with the block's own input.
    """

    shared: nn.Module
    given: Tensor | None = None
    early: Tensor | None = None
    routed: bool = False
    proved: bool = False

    def work(self) -> Callable[[], None] | None:
        """What the routed experts may do while they wait; they tell so that they have begun."""
        self.routed = True
        return self._compute if self.proved and not self.shared._forward_hooks else None

    def _compute(self) -> None:
        with span("shared expert"):
            self.early = self.shared(self.given)

    def answer(self, x: Tensor) -> Tensor | None:
        """The output that was computed early, if it is of this input; else learn from the call."""
        early, self.early = self.early, None
        if early is not None and x is self.given:
            return early
        self.proved = self.routed and x is self.given
        return None


class BesideBlock(nn.Module):
    """A block of routed and shared experts, of which the shared one may run early."""

    _plait_beside: Beside

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        beside = self._plait_beside
        beside.given, beside.early, beside.routed = hidden_states, None, False
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            beside.given = beside.early = None


class EarlyModule(nn.Module):
    """A shared expert that may have run before it is called."""

    _plait_beside: Beside

    def forward(self, x: Tensor) -> Tensor:
        early = self._plait_beside.answer(x)
        return super().forward(x) if early is None else early


def beside_edits(model: nn.Module, roles: list[Edit]) -> list[Edit]:
    """Let shared experts run while the tokens of routed ones travel."""
    values = {
        id(e.owner): e.value
        for e in roles
        if isinstance(e, SetAttribute) and e.name == "_plait_experts"
    }
    edits: list[Edit] = []
    for block in model.modules():
        routed = [m for m in block.children() if id(m) in values]
        shared = [m for name, m in block.named_children() if name in NAMES]
        if len(routed) != 1 or len(shared) != 1:
            continue
        here = values[id(routed[0])]
        if here.sums or here.pad or here.nodes is not None or here.copies is not None:
            continue
        beside = Beside(shared[0])
        edits += [
            SetAttribute(routed[0], "_plait_experts", replace(here, beside=beside)),
            SetAttribute(block, "_plait_beside", beside),
            SetAttribute(shared[0], "_plait_beside", beside),
            SwapClass(block, BesideBlock),
            SwapClass(shared[0], EarlyModule),
        ]
    return edits
