"""Selectors by name: ``quest:budget=0.1``, ``rocket:budget=256``."""

from __future__ import annotations

from ..named import read_named
from .delta import Delta
from .exact import Exact
from .hylra import HyLRA
from .quest import Quest
from .recent import Recent
from .rocket import Rocket
from .rocket_mt import RocketMT
from .selector import Selector
from .sparq import SparQ
from .top_p import TopP

SELECTORS: dict[str, type[Selector]] = {
    kind.name: kind for kind in (Delta, Exact, HyLRA, Quest, Recent, Rocket, RocketMT, SparQ, TopP)
}


def find_selector(given: str | Selector) -> Selector:
    """Read a selector such as ``quest:budget=0.1``, or give the given one.

    Raises:
        ValueError: naming the selectors, or the options, that there are.
    """
    return read_named("selector", given, SELECTORS) if isinstance(given, str) else given
