"""Pages of one head in fewer bits: coded, decoded, attended in place or decoded a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.room import room
from ..attention import DENSE_ROWS, LayerPages, ScoreOptions, attend_pages, merge_two
from ..codecs import PageLayout
from ..spec import KVSpec
from ..table import PageTable
from .budgets import Widths
from .coded import CodedLayer, CodedRun, Piece
from .compression import CompressionError
from .in_place import attend_held, held_codes
from .tiers import Tiers

TILE_BYTES = 1 << 25  # of keys and values that stand decoded at once; a tile costs 0.5 ms of Python


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
                o, lse = merge_two(merged, (o, lse))
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
