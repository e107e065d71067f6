"""Routed experts inside a transformers feed-forward block."""

from __future__ import annotations

from torch import nn

from ..experts import RoutedExperts
from ..experts.compute import is_packed
from ..roles import Role


def roles_in(block: nn.Module) -> dict[str, Role]:
    """Find the routed experts of a block; the router and shared experts stay the model's own code."""
    return {name: RoutedExperts() for name, module in block.named_modules() if is_packed(module)}
