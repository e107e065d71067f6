"""Errors about plans: what was asked, why it cannot be, what would do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlanError(ValueError):
    """Say what was asked, why it cannot be, and what would do.

    The same text is produced on every rank, because legality is a pure function of plan and shape.

    Args:
        asked: what the caller wrote, e.g. ``tp=8``.
        because: why it cannot be, e.g. ``does not divide kv_heads=6``.
        instead: what would do, e.g. ``use tp in {1, 2, 3, 6}``.
    """

    def __init__(self, asked: str, because: str, instead: str) -> None:
        super().__init__(asked, because, instead)
        self.asked = asked
        self.because = because
        self.instead = instead

    def __str__(self) -> str:
        return f"{self.asked} {self.because}; {self.instead}"


def listed(items: Iterable[object]) -> str:
    """Write a set the way our messages do: ``{1, 2, 3, 6}``."""
    return "{" + ", ".join(str(item) for item in items) + "}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Name the known words, and the near one first if there is one.

    >>> suggestion("rnig", ["ring", "ulysses"])
    "did you mean 'ring'? Known: ring, ulysses"
    """
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? Known: " if near else "use one of: "
    return hint + ", ".join(known)


def unknown(kind: str, word: str, known: Iterable[str]) -> PlanError:
    """Make the error for a name that is not one of ours."""
    return PlanError(f"{kind} {word!r}", "is not known", suggestion(word, known))
