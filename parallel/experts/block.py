"""What is changed around routed experts, in their blocks and in the model as a whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..edits import AddHook, Edit, SetAttribute
from ..ranks import ModelRanks
from .beside import beside_edits
from .joint import joint_edits
from .static import batch_edits


def block_edits(model: nn.Module, ranks: ModelRanks, roles: list[Edit]) -> list[Edit]:
    """Edits that follow from those of the experts; the order of modules, the same on every rank."""
    if not ranks.plan.cuts_experts:
        return []
    return [
        *joint_edits(model, ranks, roles),
        *beside_edits(model, roles),
        *batch_edits(model, ranks),
        *copies_edits(model, roles),
    ]


def copies_edits(model: nn.Module, roles: list[Edit]) -> list[Edit]:
    """Decide on the copies of all layers (FSSDP) when a forward begins."""
    routed = [e.value for e in roles if isinstance(e, SetAttribute) and e.name == "_plait_experts"]
    layers = [here.copies for here in routed if here.copies is not None]
    if not layers:
        return []

    def begin(*_: Any) -> None:
        for copies in layers:
            copies.begin()

    return [AddHook(lambda: model.register_forward_pre_hook(begin))]
