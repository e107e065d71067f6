"""kivi: keys in groups of tokens of one channel, values in groups of channels of one token.

Outliers of keys stay in few channels, so a scale per channel keeps them from the others: scaling a channel by a power
of two scales what comes back by the same. The newest tokens, which fill no group yet, stay exact: see `CodedTokens`.

Source: KIVI (arXiv 2402.02750).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .codec import CodecError, PageLayout, PageToBytes
from .grouped import Grouped, Groups, check_group
from .integers import Int2, Int3, Int4


@dataclass(frozen=True)
class Kivi(Grouped):
    """Keys: groups of `group` tokens of a channel."""

    name: ClassVar[str] = "kivi"
    bits: int = 2
    group: int = 32

    def __post_init__(self) -> None:
        check_group(self.name, self.bits, self.group)

    @property
    def tokens_at_once(self) -> int:
        """A group."""
        return self.group

    def for_values(self) -> PageToBytes:
        """Per token: `int4`, `int3` or `int2` with this group."""
        for kind in (Int4, Int3, Int2):
            if kind.bits == self.bits:
                return kind(self.group)
        raise CodecError(
            f"kivi: bits={self.bits} has no codec of values; use 2, 3 or 4, or K/V apart"
        )

    def groups(self, layout: PageLayout) -> Groups:
        """Along the tokens of each channel."""
        return Groups(by_channels(layout, self.group, self.name), self.bits, self.group, True)


def by_channels(layout: PageLayout, group: int, name: str) -> tuple[int, ...]:
    """See a page as `[outer, tokens, channels of all heads]`.

    Raises:
        CodecError: if its tokens are no whole groups.
    """
    if len(layout.shape) < 3:
        raise CodecError(
            f"{name} codes channels over tokens: pages must be [..., tokens, kv_heads, head_dim], "
            f"not {list(layout.shape)}"
        )
    *outer, tokens, heads, width = layout.shape
    if tokens % group:
        fits = [g for g in (8, 16, 32, 64, 128) if tokens % g == 0]
        do = f"group={fits[-1]} or " if fits else ""
        raise CodecError(
            f"{name}: groups of {group} tokens do not fit pages of {tokens}; use {do}page_tokens={group}"
        )
    return math.prod(outer), tokens, heads * width
