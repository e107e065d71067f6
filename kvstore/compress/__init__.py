"""Fewer tokens, chosen: what a cache keeps when it may not keep all."""

from .choose import keep_best
from .registry import BUDGETS, SCORERS, find_budget, find_scorer
from .rotary import Rotary
from .view import LayerView

__all__ = [
    "BUDGETS",
    "SCORERS",
    "LayerView",
    "Rotary",
    "find_budget",
    "find_scorer",
    "keep_best",
]
