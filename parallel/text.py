"""The text and JSON forms of a plan, and their inverses.

Text: ``axis size[:choice][,option=value]``, axes separated by spaces. An option may also follow
the colon (``kvp4:interleave=16``); printing always uses a comma.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

from .axes import AXES, Choice, normal
from .errors import PlanError, suggestion, unknown

EXAMPLE = "kvp4 tp2 ep4 etp2"
_TOKEN = re.compile(r"([a-z_]+)([0-9]{1,9})((?:[:,].*)?)")


def parse(text: str) -> dict[str, Any]:
    """Read the text form into fields of a Plan.

    >>> parse("tp2:sp etp4")
    {'tp': Tensor(size=2, sp=True, replicate_kv=False, fuse=True, weave=1), 'etp': 4}
    """
    if not isinstance(text, str):
        raise PlanError(f"plan {text!r}", "is not text", f"write a plan such as {EXAMPLE!r}")
    read: dict[str, Any] = {}
    for token in text.split():
        axis, choice = _axis(token)
        if axis in read:
            raise PlanError(f"{token!r}", f"gives {axis} a second time", f"write {axis} once")
        read[axis] = choice
    if not read:
        raise PlanError(f"plan {text!r}", "names no axis", "write 'tp1' for a plan of one rank")
    return read


def _axis(token: str) -> tuple[str, Any]:
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise _garbage(token)
    axis, size, rest = found.groups()
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    parts = re.split("[:,]", rest)[1:] if rest else []
    return axis, _choice(axis, int(size), parts, token)


def _garbage(token: str) -> PlanError:
    name = re.match(r"[A-Za-z_]*", token)
    axis = name.group() if name else ""
    if axis in AXES:
        because = f"is not {axis} with a size"
        return PlanError(f"{token!r}", because, f"write {axis} and a whole number, e.g. {axis}2")
    because = "is not an axis with a size"
    near = suggestion(axis, AXES) if axis else f"write e.g. {EXAMPLE!r}"
    return PlanError(f"{token!r}", because, near)


def _words(axis: str) -> dict[str, tuple[type[Choice], dict[str, Any]]]:
    """Bare words of an axis: the class each selects, and the options it sets."""
    words: dict[str, tuple[type[Choice], dict[str, Any]]] = {}
    for kind in AXES[axis]:
        words[kind.kind] = (kind, {})
        words.update({word: (kind, dict(sets)) for word, sets in kind.words.items()})
    return words


def _choice(axis: str, size: int, parts: list[str], token: str) -> Any:
    words, chosen, given = _words(axis), None, {}
    if parts and not words:
        raise PlanError(
            f"{token!r}", f"gives {axis} an option, and it has none", f"write {axis}{size}"
        )
    pending: list[tuple[str, str]] = []
    for part in parts:
        name, equals, value = part.partition("=")
        if equals:
            pending.append((name, value))
        elif part in words:
            kind, sets = words[part]
            if chosen not in (None, kind) or given.keys() & sets.keys():
                raise PlanError(
                    f"{token!r}", "makes two choices", f"keep one of: {', '.join(words)}"
                )
            chosen = kind
            given.update(sets)
        else:
            raise unknown(f"{axis} choice", part, dict.fromkeys([*words, *_option_names(axis)]))
    if not AXES[axis]:
        return normal(axis, size)
    kind = chosen or AXES[axis][0]
    for name, value in pending:
        if name in given:
            raise PlanError(f"{token!r}", f"gives {name} a second time", f"write {name} once")
        given[name] = _value(axis, kind, name, value)
    return kind(size, **given)  # type: ignore[call-arg]


def _option_names(axis: str) -> list[str]:
    return [f.name for kind in AXES[axis] for f in fields(kind) if f.name != "size"]  # type: ignore[arg-type]


def _value(axis: str, kind: type[Choice], name: str, value: str) -> Any:
    defaults = {f.name: f.default for f in fields(kind) if f.name != "size"}  # type: ignore[arg-type]
    if name not in defaults:
        if not defaults:
            raise PlanError(
                f"{axis} option {name!r}", f"is not known; {kind.kind} has none", "drop it"
            )
        raise unknown(f"{axis} option", name, defaults)
    default = defaults[name]
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise PlanError(f"{name}={value}", "is not true or false", f"write {name}=true")
        return value == "true"
    if default is None or isinstance(default, int):
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise PlanError(f"{name}={value}", "is not a whole number", f"write e.g. {name}=4")
        return int(value)
    if isinstance(default, float):
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            raise PlanError(f"{name}={value}", "is not a number", f"write e.g. {name}=1.25")
        return float(value)
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else value  # auto, or a number


def show(axis: str, choice: Any) -> str:
    """Print one axis."""
    return choice.text() if isinstance(choice, Choice) else f"{axis}{choice}"


def spoken(values: dict[str, Any]) -> dict[str, Any]:
    """Keep the axes worth saying: not the untouched defaults; etp always beside experts."""
    kept = {axis: values[axis] for axis in AXES if values[axis] != normal(axis, 1)}
    if "ep" in kept and "etp" not in kept:
        kept = {axis: values[axis] for axis in AXES if axis in kept or axis == "etp"}
    return kept or {"tp": values["tp"]}


def to_json(values: dict[str, Any]) -> str:
    """Write JSON: an int where the default choice says all, else an object."""
    out: dict[str, Any] = {}
    for axis, choice in spoken(values).items():
        if not isinstance(choice, Choice) or choice == normal(axis, choice.size):
            out[axis] = choice.size if isinstance(choice, Choice) else choice
        else:
            out[axis] = {"size": choice.size, "choice": choice.kind, **choice.options()}
    return json.dumps(out)


def from_json(text: str) -> dict[str, Any]:
    """Read what to_json wrote, strictly."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError("plan JSON", f"does not parse ({error})", 'write e.g. {"tp": 2}') from None
    if not isinstance(data, dict) or not data:
        raise PlanError("plan JSON", "is not an object of axes", 'write e.g. {"tp": 2}')
    return {axis: _from_json_axis(axis, value) for axis, value in data.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"plan JSON key {name!r}", "comes twice", "write it once")
    return dict(pairs)


def _from_json_axis(axis: str, value: Any) -> Any:
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    if not isinstance(value, dict):
        return normal(axis, value)
    rest = dict(value)
    kinds = {kind.kind: kind for kind in AXES[axis]}
    if not kinds:
        raise PlanError(f"{axis}={value}", "is not a whole number", f"write e.g. {axis}=2")
    if "size" not in rest:
        raise PlanError(f"{axis}={value}", "has no size", 'add "size": 2')
    size, name = rest.pop("size"), rest.pop("choice", next(iter(kinds)))
    if str(name) not in kinds:
        raise unknown(f"{axis} choice", str(name), kinds)
    for option in rest:
        if option not in {f.name for f in fields(kinds[name])}:  # type: ignore[arg-type]
            raise unknown(f"{axis} option", option, _option_names(axis))
    return kinds[name](size, **rest)  # type: ignore[call-arg]
