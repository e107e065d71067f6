"""Scorers and budgets by name: ``snapkv:window=32``, ``ada:floor=0.3``, ``critical:base=expected``."""

from __future__ import annotations

from ..named import read_named
from .budgets import Ada, Budget, Pyramid, Threshold, Uniform, WaterFill
from .scorers import (
    H2O,
    Critical,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    LagKV,
    Scorer,
    SnapKV,
    Streaming,
    Tova,
)

SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind
    for kind in (
        Critical,
        ExpectedAttention,
        H2O,
        KeyDiff,
        Knorm,
        KVzip,
        LagKV,
        SnapKV,
        Streaming,
        Tova,
    )
}
BUDGETS: dict[str, type[Budget]] = {
    kind.name: kind for kind in (Ada, Pyramid, Threshold, Uniform, WaterFill)
}


def find_scorer(text: str) -> Scorer:
    """Read a scorer such as ``snapkv:window=32,kernel=7``.

    ``triattention`` needs calibrated means and has no text form: make the object.

    Raises:
        ValueError: naming the scorers, or the options, that there are.
    """
    return read_named("scorer", text, SCORERS)


def find_budget(text: str) -> Budget:
    """Read a budget rule such as ``ada:floor=0.3``.

    Raises:
        ValueError: naming the rules, or the options, that there are.
    """
    return read_named("budget", text, BUDGETS)
