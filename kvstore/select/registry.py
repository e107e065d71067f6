"""Selectors by name: ``recent:tokens=512``."""

from __future__ import annotations

from ..named import read_named
from .recent import Recent
from .selector import Selector

SELECTORS: dict[str, type[Selector]] = {kind.name: kind for kind in (Recent,)}


def find_selector(given: str | Selector) -> Selector:
    """Read a selector such as ``recent:tokens=512``, or give the given one.

    Raises:
        ValueError: naming the selectors, or the options, that there are.
    """
    return read_named("selector", given, SELECTORS) if isinstance(given, str) else given
