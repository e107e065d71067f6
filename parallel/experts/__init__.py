"""Experts over ranks: MoE Parallel Folding. Tokens find their experts wherever they are, and come back."""

from .balance import BiasBalance
from .joint import joint_edits
from .role import RoutedExperts
from .routing import Routing, record_routing

__all__ = ["BiasBalance", "RoutedExperts", "Routing", "joint_edits", "record_routing"]
