"""Draw from a hypothesis strategy outside of a test: the cases are known before any rank starts."""

from __future__ import annotations

from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")


def draw_one(strategy: SearchStrategy[T], number: int) -> T:
    """Draw what belongs to a number; the last of a few, because hypothesis begins with the simplest."""
    found: list[T] = []

    @seed(number)
    @settings(
        max_examples=5,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(each: T) -> None:
        found.append(each)

    draw()
    return found[-1]
