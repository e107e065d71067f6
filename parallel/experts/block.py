"""What is changed around routed experts, in their blocks and in the model as a whole."""

from __future__ import annotations

from torch import nn

from ..edits import Edit
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
    ]
