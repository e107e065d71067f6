"""Kept tokens in fewer bits: tiers of codecs, pages held as bytes, attention to them decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels import merge_states
from ...cuda_kernels.room import room
from ..attention import DENSE_ROWS, LayerPages, ScoreOptions, attend_pages
from ..codecs import CodecError, KVCodec, PageLayout, find_kv_codec
from ..spec import KVSpec
from ..table import PageTable
from .budgets import Widths
from .choose import order
from .compression import CompressionError
from .in_place import HeldCodes, attend_held, held_codes

TILE_BYTES = 1 << 25  # of keys and values that stand decoded at once; a tile costs 0.5 ms of Python


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


@dataclass(frozen=True, eq=False)
class CodedRun:
    """Pages of one layer that were coded together; never written again, so forks share them.

    Shape: heads `[pages]` whose each page is, ascending; places `[pages, page_tokens]` int32.
    """

    tier: int
    keys: np.ndarray
    values: np.ndarray
    heads: np.ndarray
    places: np.ndarray

    @property
    def num_bytes(self) -> int:
        """What it takes, places included."""
        return self.keys.size + self.values.size + self.places.nbytes + self.heads.nbytes


class Piece(NamedTuple):
    """Some pages of a run: from `start` to before `stop`."""

    run: CodedRun
    start: int
    stop: int


@dataclass
class CodedLayer:
    """The coded pages of one layer of one sequence.

    Attributes:
        loose: newest tokens of each exact lane that follow each other and may be coded when there are enough.
    """

    runs: list[CodedRun] = field(default_factory=list)
    loose: int = 0
    held: dict[int, HeldCodes] = field(default_factory=dict)  # by tier, see `held_codes`
    _pages: tuple[int, list[np.ndarray]] = (0, [])  # of so many runs

    def copy(self) -> CodedLayer:
        """For a fork."""
        return CodedLayer(list(self.runs), self.loose)

    def pages(self, kv_heads: int) -> list[np.ndarray]:
        """Each head's pages in the order in which they were coded. Shape: `[n, 2]`: run, page of it"""
        if self._pages[0] != len(self.runs) or not self._pages[1]:
            heads = np.concatenate([run.heads for run in self.runs] or [np.empty(0, np.int32)])
            each = [(n, at) for n, run in enumerate(self.runs) for at in range(len(run.heads))]
            both = np.array(each, np.int64).reshape(-1, 2)
            self._pages = len(self.runs), [both[heads == head] for head in range(kv_heads)]
        return self._pages[1]

    def counts(self, kv_heads: int) -> np.ndarray:
        """Tokens of each head."""
        out = np.zeros(kv_heads, np.int64)
        for run in self.runs:
            out += np.bincount(run.heads, minlength=kv_heads) * run.places.shape[1]
        return out


@dataclass(frozen=True)
class PageCoder:
    """Codes and decodes pages of one head."""

    tiers: Tiers
    spec: KVSpec

    @cached_property
    def layers(self) -> tuple[PageCoder, ...]:
        """The coder of each layer."""
        count = self.spec.layers
        return tuple(PageCoder(self.tiers.of_layer(n, count), self.spec) for n in range(count))

    @property
    def widths(self) -> Widths:
        """What a token may take, for rules that choose."""
        size, both = self.spec.page_tokens, self.spec.widths
        layouts = [PageLayout((1, size, 1, width), self.spec.dtype) for width in both]
        whole = sum(layout.page_bytes for layout in layouts)
        costs = [
            sum(part.max_bytes(own) for part, own in zip((c.keys, c.values), layouts, strict=True))
            for c in reversed(self.tiers.codecs)
        ] + [whole] * (self.tiers.exact > 0)
        if any(b <= a for a, b in pairwise(costs)):
            raise CompressionError(
                f"codec={self.tiers}: pages of its tiers take {costs[::-1]} bytes; give the widest first, each next "
                "one with fewer bits"
            )
        return Widths(tuple(costs), sum(layout.numel for layout in layouts), whole)

    def encode(
        self, tier: int, k: list[Tensor], v: list[Tensor], places: list[np.ndarray]
    ) -> CodedRun | None:
        """Code whole pages of each head. Shape: k `[kv_heads]` of `[tokens, head_dim]`, ...; tokens: whole pages"""
        size, codec = self.spec.page_tokens, self.tiers.codecs[tier]
        pages = [len(own) // size for own in places]
        if not sum(pages):
            return None
        keys, values = (
            part.encode(torch.cat(rows).reshape(-1, size, 1, rows[0].shape[-1]))
            for part, rows in ((codec.keys, k), (codec.values, v))
        )
        heads = np.repeat(np.arange(len(pages), dtype=np.int32), pages)
        where = np.concatenate(places).astype(np.int32).reshape(-1, size)
        return CodedRun(tier, keys, values, heads, where)

    def decode_keys(self, layer: CodedLayer, pages: np.ndarray) -> Tensor:
        """Keys of some pages. Shape: pages `[n, 2]`, see `CodedLayer.pages` -> `[n, page_tokens, 1, head_dim]`"""
        return self._some(layer, pages, values=False)

    def decode_pages(self, layer: CodedLayer, pages: np.ndarray) -> tuple[Tensor, Tensor]:
        """Keys and values of some pages."""
        return self._some(layer, pages, values=False), self._some(layer, pages, values=True)

    def _some(self, layer: CodedLayer, pages: np.ndarray, values: bool) -> Tensor:
        """Decode a part of some runs."""
        layout = self.layouts[values]
        out = torch.empty(len(pages), *layout.shape, dtype=layout.dtype)
        for number in np.unique(pages[:, 0]):
            run, at = layer.runs[number], np.flatnonzero(pages[:, 0] == number)
            codecs = self.tiers.codecs[run.tier]
            codec, data = (codecs.values, run.values) if values else (codecs.keys, run.keys)
            some = codec.some_pages(data, layout, pages[at, 1])
            decoded = codec.decode(some, PageLayout((len(at), *layout.shape), layout.dtype))
            if len(at) == len(pages):
                return decoded
            out[torch.from_numpy(at)] = decoded
        return out

    @property
    def layouts(self) -> list[PageLayout]:
        """A page's, of keys and of values."""
        size, dtype = self.spec.page_tokens, self.spec.dtype
        return [PageLayout((size, 1, width), dtype) for width in self.spec.widths]

    def attend(
        self, layer: CodedLayer, q: Tensor, lo: np.ndarray, hi: np.ndarray, options: ScoreOptions
    ) -> tuple[Tensor, Tensor] | None:
        """Attend to all coded pages of one layer of one sequence, in place or decoded a few at a time.

        Shape: q `[rows, heads, head_dim]`; lo, hi `[rows]` places in the text -> o `[rows, heads, value_dim]`, lse
        """
        merged = None
        for o, lse in self._parts(layer, q, lo, hi, options):
            o = o.to(lse.dtype)
            if merged is not None:
                o, lse = merge_states(torch.stack([merged[0], o]), torch.stack([merged[1], lse]))
            merged = o, lse
        if merged is None:
            return None
        shape = (self.spec.kv_heads, len(q))
        return tuple(x.unflatten(0, shape).transpose(0, 1).flatten(1, 2) for x in merged)  # type: ignore[return-value]

    def _parts(
        self, layer: CodedLayer, q: Tensor, lo: np.ndarray, hi: np.ndarray, options: ScoreOptions
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Attend to pages where they lie, tier by tier; those that no kernel reads so, or for many rows, by tiles."""
        known = {run.tier for run in layer.runs} if len(q) <= DENSE_ROWS else ()
        read = {tier: held for tier in known if (held := held_codes(self, layer, tier))}
        for held in read.values():
            yield attend_held(held, q, lo, hi, options)
        if all(run.tier in read for run in layer.runs):
            return
        space = self._space(layer)
        for tile in self._tiles(layer):
            if tile[0].run.tier not in read:
                yield self._attend_tile(tile, space, q, lo, hi, options)

    @property
    def _tile_pages(self) -> int:
        return max(1, TILE_BYTES // sum(layout.page_bytes for layout in self.layouts))

    def _space(self, layer: CodedLayer) -> list[Tensor]:
        """Memory for the keys and the values of any tile."""
        pages = [len(run.heads) for run in layer.runs]
        most = min(sum(pages), max(self._tile_pages, *pages)) if pages else 0
        return [room((most, *layout.shape), layout.dtype) for layout in self.layouts]

    def _tiles(self, layer: CodedLayer) -> Iterator[list[Piece]]:
        """Cut the runs of each tier, in which places ascend, into pieces of so many pages."""
        most = self._tile_pages
        for tier, codec in enumerate(self.tiers.codecs):
            whole = any(
                part.sections(layout) is None
                for part, layout in zip((codec.keys, codec.values), self.layouts, strict=True)
            )
            tile, left = [], most
            for run in layer.runs:
                at, count = 0, len(run.heads) if run.tier == tier else 0
                if whole and tile and count > left:
                    yield tile
                    tile, left = [], most
                while at < count:
                    stop = count if whole else min(count, at + left)
                    tile.append(Piece(run, at, stop))
                    left -= stop - at
                    at = stop
                    if left <= 0:
                        yield tile
                        tile, left = [], most
            if tile:
                yield tile

    def _decode_tile(self, tile: list[Piece], space: list[Tensor]) -> None:
        """Fill the first pages of `space`."""
        codec, at = self.tiers.codecs[tile[0].run.tier], 0
        for run, start, stop in tile:
            for part, data, layout, x in zip(
                (codec.keys, codec.values),
                (run.keys, run.values),
                self.layouts,
                space,
                strict=True,
            ):
                if stop - start < len(run.heads):
                    data = part.some_pages(data, layout, slice(start, stop))
                part.decode_into(data, x[at : at + stop - start])
            at += stop - start

    def _attend_tile(
        self, tile: list[Piece], space: list[Tensor], q: Tensor, lo: np.ndarray, hi: np.ndarray,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attend to some pages of one tier. Shape: -> `[kv_heads * rows, group, value_dim]`, lse"""
        self._decode_tile(tile, space)
        heads = np.concatenate([run.heads[a:b] for run, a, b in tile])
        places = np.concatenate([run.places[a:b] for run, a, b in tile])
        kv_heads, rows = self.spec.kv_heads, len(q)
        pages = [np.flatnonzero(heads == head) for head in range(kv_heads)]
        counts = np.array([len(own) for own in pages]) * self.spec.page_tokens
        where = [places[own].ravel() for own in pages]
        first, stop = (
            torch.from_numpy(np.concatenate([np.searchsorted(own, x) for own in where]))
            for x in (lo, hi)
        )
        table = PageTable([own.astype(np.int32) for own in pages], counts, self.spec.page_tokens)
        asked = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1)
        indptr = np.arange(kv_heads + 1) * rows
        regions = LayerPages(space[0], space[1], self.spec.v_dim)
        return attend_pages(regions, table, asked, indptr, first, stop, options)
