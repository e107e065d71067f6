"""int4, int3, int2: round-to-nearest per token, groups of channels, between their least and largest element.

Source: the V half of KIVI (arXiv 2402.02750); for K it breaks on channels with outliers, which is what KIVI is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .codec import PageLayout
from .grouped import Grouped, Groups, check_group


@dataclass(frozen=True)
class IntTokens(Grouped):
    """Groups of `group` channels of a token's vector; the last one of a head may be shorter."""

    bits: ClassVar[int]
    group: int = 32

    def __post_init__(self) -> None:
        check_group(self.name, self.bits, self.group)

    def groups(self, layout: PageLayout) -> Groups:
        """Along each vector."""
        width = layout.shape[-1]
        return Groups((layout.vectors, width), self.bits, min(self.group, width), False)


@dataclass(frozen=True)
class Int4(IntTokens):
    """Sixteen levels."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Int3(IntTokens):
    """Eight levels."""

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class Int2(IntTokens):
    """Four levels."""

    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2
