"""Which cached tokens one decode step reads: nothing is lost, only reads shrink."""

from .registry import SELECTORS, find_selector
from .selector import KeyView, Selection, Selector

__all__ = ["SELECTORS", "KeyView", "Selection", "Selector", "find_selector"]
