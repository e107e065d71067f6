"""Plain modules: inputs are compared; attention is reached through scaled_dot_product_attention."""

from __future__ import annotations

from torch import nn

from .edits import Edit
from .ranks import ModelRanks


def module_edits(model: nn.Module, ranks: ModelRanks) -> list[Edit]:
    """Edits of a module that is not a transformers model."""
    return []
