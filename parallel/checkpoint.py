"""State dicts of a cut model."""

from __future__ import annotations

from .edits import CutParameter, Edit
from .ranks import ModelRanks


def state_dict_edits(cuts: list[CutParameter], ranks: ModelRanks) -> list[Edit]:
    """Edits that make state dicts DTensors."""
    return []
