"""Tiers of kept tokens: which codec holds which share of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..codecs import CodecError, KVCodec, PageLayout, find_kv_codec
from ..spec import KVSpec
from .choose import order
from .compression import CompressionError


@dataclass(frozen=True)
class Tiers:
    """How kept tokens are held, the most important first: `"none@0.25|int8@0.5|int2"`; "none" is exact.

    Args:
        codecs: of the coded tiers, the widest first; shares: of each but the last, which takes the rest. None: a rule
            that gives tokens widths says (`"none|int8|int2"`).
        exact: share that stays as it is; without shares, whether a token may: 1 or 0.
        tail: newest tokens that stay exact; so do those that fill no page.
    """

    codecs: tuple[KVCodec, ...]
    shares: tuple[float, ...] | None = ()
    exact: float = 0.0
    tail: int = 32

    def __post_init__(self) -> None:
        shares = [0.0] * (len(self.codecs) - 1) if self.shares is None else self.shares
        given = (*shares, self.exact)
        if len(shares) != len(self.codecs) - 1 or min(given) < 0 or sum(given) > 1:
            raise CompressionError(
                f"{len(self.codecs)} tiers with shares {given}: each but the last needs one, and they may sum to 1"
            )
        if self.tail < 0:
            raise CompressionError(f"tail={self.tail} must be at least 0 tokens")

    @classmethod
    def parse(cls, text: str, tail: int = 32) -> Tiers:
        """Read the text form.

        Raises:
            ValueError: naming what there is.
        """
        codecs, shares = [], []
        for piece in text.split("|"):
            name, _, share = piece.strip().partition("@")
            codecs.append(name)
            shares.append(float(share) if share else None)
        if len(codecs) > 1 and not any(shares):
            exact = codecs[0] == "none"
            return cls(
                tuple(find_kv_codec(name) for name in codecs[exact:]), None, float(exact), tail
            )
        exact = 0.0
        if codecs[0] == "none" and len(codecs) > 1:
            exact, codecs, shares = shares[0] or 0.0, codecs[1:], shares[1:]
        if "none" in codecs or None in shares[:-1] or shares[-1] is not None:
            raise CompressionError(
                f"codec {text!r}: tiers go from the exact one down, each with @share but the last, which takes the "
                "rest, such as 'none@0.25|int8@0.5|int2' or 'int4'; or all without, for rule=waterfill"
            )
        known = tuple(share for share in shares[:-1] if share is not None)
        return cls(tuple(find_kv_codec(name) for name in codecs), known, exact, tail)

    def __str__(self) -> str:
        if self.shares is None:
            return "|".join(
                (["none"] if self.exact else []) + [str(codec) for codec in self.codecs]
            )
        shares = [f"@{share}" for share in self.shares] + [""]
        parts = [str(codec) + share for codec, share in zip(self.codecs, shares, strict=True)]
        return "|".join(([f"none@{self.exact}"] if self.exact else []) + parts)

    @cached_property
    def ranked(self) -> bool:
        """Whether it matters which tokens are more important."""
        return len(self.codecs) > 1 or self.exact > 0

    def check(self, spec: KVSpec) -> None:
        """Refuse codecs that cannot take a page of one head.

        Raises:
            CompressionError: naming the codec and why.
        """
        for codec in self.codecs:
            for number in range(spec.layers):
                try:
                    own = codec.of_layer(number, spec.layers)
                    for part, width in zip((own.keys, own.values), spec.widths, strict=True):
                        part.max_bytes(PageLayout((1, spec.page_tokens, 1, width), spec.dtype))
                except CodecError as error:
                    raise CompressionError(
                        f"codec {codec} cannot hold pages of {spec.page_tokens} tokens of one head: {error}"
                    ) from error

    def of_layer(self, number: int, layers: int) -> Tiers:
        """With each codec's own of a layer."""
        return replace(self, codecs=tuple(own.of_layer(number, layers) for own in self.codecs))

    def together(self, spec: KVSpec) -> str | None:
        """The codec whose pages, coded together, cannot be decoded apart; None if there is none."""
        for codec in self.of_layer(0, spec.layers).codecs:
            for part, width in zip((codec.keys, codec.values), spec.widths, strict=True):
                if part.sections(PageLayout((spec.page_tokens, 1, width), spec.dtype)) is None:
                    return str(part)
        return None

    def assign(
        self, count: int, scores: Tensor | None, size: int, levels: Tensor | None = None
    ) -> list[Tensor]:
        """Say which of a head's kept tokens each tier holds, ascending: the exact ones, then tier by tier.

        Args:
            scores: of the tokens; None ranks newer ones first.
            size: tokens of a page; coded tiers hold whole pages, what is over stays exact.
            levels: the width that a rule gave each token, 1 the last tier's.
        """
        newest = torch.arange(count - 1, -1, -1)
        ranked = newest
        if scores is not None:
            tail = newest[: self.tail]
            rest = order(scores[: count - len(tail)][None])[0]
            ranked = torch.cat([tail, rest])
        if levels is not None:
            wide = torch.bincount(levels, minlength=len(self.codecs) + 2).flip(0).tolist()
            exact, room = wide[0], wide[1 : len(self.codecs)]
        else:
            exact = int(count * self.exact)
            room = [int(count * share) for share in self.shares or ()]
        exact = max(exact, min(self.tail, count))
        sizes = [min(n, count - exact) // size * size for n in room]
        while sum(sizes) > count - exact:  # a long tail leaves less than the shares say
            sizes[int(np.argmax(sizes))] -= size
        sizes.append((count - exact - sum(room)) // size * size if count > exact + sum(room) else 0)
        cuts = [count - sum(sizes), *sizes]
        return [own.sort().values for own in ranked.split(cuts)]
