"""Sets of layers as text: ``0+1+2+14+22``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self


class Layers(tuple[int, ...]):
    """Ascending numbers of layers."""

    def __new__(cls, given: str | Iterable[int]) -> Self:
        """Read the text form, or take numbers.

        Raises:
            ValueError: if they are no numbers of layers.
        """
        numbers = given.split("+") if isinstance(given, str) else given
        made = super().__new__(cls, sorted({int(number) for number in numbers}))
        if not made or made[0] < 0:
            raise ValueError(f"layers {given!r} are numbers from 0 on, such as 0+1+14")
        return made

    def __str__(self) -> str:
        return "+".join(map(str, self))

    def leader(self, layer: int) -> int | None:
        """The last of these layers up to a layer; None if there is none."""
        return max((own for own in self if own <= layer), default=None)

    def leads(self, layer: int, layers: int) -> bool:
        """Say whether it is one of these, and the next layer is not."""
        return layer in self and layer + 1 not in self and layer + 1 < layers
