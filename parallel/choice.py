"""What all choices of axes share, and the checks of their numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import PlanError, suggestion

if TYPE_CHECKING:
    from .plan import Plan
    from .shape import ModelShape

Problem = tuple[str, str]  # why it cannot be; what would do ("": some other size, to be computed)


def whole(name: str, value: object) -> None:
    """Refuse anything but a whole number of at least 1 (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, int):
        what = f"{name}={value!r}"
        raise PlanError(what, "is not a whole number", f"use an int such as {name}=2")
    if value < 1:
        raise PlanError(f"{name}={value}", "is not positive", f"use {name} >= 1")


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse an option value that is not one of the known words."""
    if value not in known:
        raise PlanError(f"{name}={value!s}", "is not known", suggestion(str(value), known))


def file_name(name: str, value: object) -> None:
    """Refuse what is no path, or one that the text of a plan cannot hold; "" is none."""
    if not isinstance(value, str) or set(value) & set(" \t\n,:=") or value.isdigit():
        because = "is no path that a plan can say: it has spaces, commas, colons or digits only"
        raise PlanError(f"{name}={value!r}", because, f"use e.g. {name}=runs/{name}.json")


class Choice:
    """What all choices share: an axis, a size, a text form, and legality.

    ``words`` are the bare words of the text form and the options each sets: ``sp`` in ``tp2:sp``.
    """

    __slots__ = ()
    axis: ClassVar[str]
    kind: ClassVar[str]
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    size: int

    @property
    def word(self) -> str:
        """The bare word to print after the colon, or nothing."""
        return ""

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, in order."""
        pairs = ((f.name, getattr(self, f.name), f.default) for f in fields(self))  # type: ignore[arg-type]
        return {
            name: value for name, value, default in pairs if value != default and name != "size"
        }

    def text(self) -> str:
        """Print the choice as it stands in a plan, e.g. ``tp8:sp,replicate_kv=true``."""
        covered = self.words.get(self.word, {})
        said = f"{self.axis}{self.size}" + (f":{self.word}" if self.word else "")
        for name, value in self.options().items():
            if name not in covered:
                said += f",{name}={str(value).lower() if isinstance(value, bool) else value}"
        return said

    def problem(self, plan: Plan, shape: ModelShape) -> Problem | None:
        """Say why this choice cannot be, or None. Unknown (None) numbers of the shape pass."""
        return None

    def validate(self, plan: Plan, shape: ModelShape) -> None:
        """Raise PlanError unless this choice is legal in this plan for this shape."""
        from .legality import remedy  # which needs the classes below

        found = self.problem(plan, shape)
        if found is not None:
            because, instead = found
            asked = f"{self.axis}={self.size}"
            raise PlanError(asked, because, instead or remedy(self, plan, shape))
