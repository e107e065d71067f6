"""Experts over ranks: MoE Parallel Folding. Tokens find their experts wherever they are, and come back."""

from .balance import BiasBalance
from .block import block_edits
from .local import LocalExperts
from .offload import offload_experts
from .role import RoutedExperts
from .routing import Routing, record_routing
from .zloss import RouterZLoss

__all__ = [
    "BiasBalance",
    "LocalExperts",
    "RoutedExperts",
    "RouterZLoss",
    "Routing",
    "block_edits",
    "offload_experts",
    "record_routing",
]
