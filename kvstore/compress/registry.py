"""Scorers and budgets by name: ``snapkv:window=32``, ``ada:floor=0.3``, ``critical:base=expected``."""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import Any

from .budgets import Ada, Budget, Pyramid, Threshold, Uniform
from .scorers import (
    H2O,
    Critical,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LagKV,
    Scorer,
    SnapKV,
    Streaming,
    Tova,
)

SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind
    for kind in (Critical, ExpectedAttention, H2O, KeyDiff, Knorm, LagKV, SnapKV, Streaming, Tova)
}
BUDGETS: dict[str, type[Budget]] = {kind.name: kind for kind in (Ada, Pyramid, Threshold, Uniform)}


def find_scorer(text: str) -> Scorer:
    """Read a scorer such as ``snapkv:window=32,kernel=7``.

    ``triattention`` needs calibrated means and has no text form: make the object.

    Raises:
        ValueError: naming the scorers, or the options, that there are.
    """
    return _read("scorer", text, SCORERS)


def find_budget(text: str) -> Budget:
    """Read a budget rule such as ``ada:floor=0.3``.

    Raises:
        ValueError: naming the rules, or the options, that there are.
    """
    return _read("budget", text, BUDGETS)


def _read(what: str, text: str, known: dict[str, Any]) -> Any:
    name, _, rest = text.partition(":")
    if name not in known:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(sorted(known))}")
    kind, types = known[name], typing.get_type_hints(known[name])
    options = [field.name for field in fields(kind)]
    given: dict[str, Any] = {}
    for piece in filter(None, rest.split(",")):
        key, _, value = piece.partition("=")
        if key not in options:
            has = ", ".join(options) or "none"
            raise ValueError(f"{what} {text!r}: {name} has no option {key!r}; it has {has}")
        try:
            given[key] = _value(types[key], value)
        except ValueError as error:
            raise ValueError(
                f"{what} {text!r}: {key}={value!r} is not {types[key].__name__}"
            ) from error
    return kind(**given)


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return find_scorer(text) if kind is Scorer else kind(text)
