"""Choices as text: `name:option=value,option=value`, the options that stand at their default left out.

    str(SnapKV(window=32, kernel=7)) == "snapkv:window=32,kernel=7"
    read_named("scorer", "critical:base=(snapkv:window=32,kernel=7),first=0.3", SCORERS)

An option that is itself such a choice stands in parentheses if it has options of its own.
"""

from __future__ import annotations

import typing
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True)
class Named(ABC):
    """A frozen value with a name and options; its text form reads back to an equal value."""

    name: ClassVar[str]

    def __str__(self) -> str:
        given = ((field, getattr(self, field.name)) for field in fields(self))
        options = [
            f"{field.name}={_text(value)}" for field, value in given if value != field.default
        ]
        return self.name + (":" + ",".join(options) if options else "")


Choice = TypeVar("Choice", bound=Named)


def read_named(what: str, text: str, known: Mapping[str, type[Choice]]) -> Choice:
    """Read a choice; one nested in it is looked for among the same names.

    Args:
        what: the word for it in errors, such as "codec".

    Raises:
        ValueError: naming the choices, or the options, that there are; or from the choice itself.
    """
    name, _, rest = text.strip().partition(":")
    if name not in known:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(sorted(known))}")
    types = typing.get_type_hints(known[name])
    options = [field.name for field in fields(known[name])]
    given: dict[str, Any] = {}
    for piece in pieces(rest):
        key, _, value = piece.partition("=")
        if key not in options:
            has = ", ".join(options) or "none"
            raise ValueError(f"{what} {text!r}: {name} has no such option as {key!r}; it has {has}")
        given[key] = _value(f"{what} {text!r}: {key}={value!r}", types[key], value, known)
    return known[name](**given)


def _text(value: Any) -> str:
    nested = isinstance(value, Named) and ":" in str(value)
    return f"({value})" if nested else str(value)


def pieces(text: str) -> list[str]:
    """Cut at commas outside parentheses."""
    found, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return [piece.strip() for piece in found if piece.strip()]


def _value(where: str, kind: Any, text: str, known: Mapping[str, type[Choice]]) -> Any:
    if isinstance(kind, type) and issubclass(kind, Named):
        return read_named(where, text.removeprefix("(").removesuffix(")"), known)
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where} is not {getattr(kind, '__name__', kind)}") from error
