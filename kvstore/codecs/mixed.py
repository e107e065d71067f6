"""Several codecs in one page, chosen for each token and head: important ones exact, others in few bits, none lost.

    mikv = Mixed((find_codec("int2"), find_codec("none")))     # tier 0, tier 1
    data = mikv.encode(k, tiers)                               # tiers [tokens, kv_heads]
    k, tiers = mikv.decode(data, layout)

A tier without codec (`None`) is eviction: zeros come back, and the map says which. With a `Balancer` before it this is
MiKV; the map itself costs `ceil(log2(tiers))` bits for each token and head.

Source: MiKV, "No Token Left Behind" (arXiv 2402.18096).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.bits import pack_into, packed_width, unpack_into
from .codec import Codec, CodecError, PageLayout


@dataclass(frozen=True)
class Mixed:
    """The packed map of tiers, then each tier's vectors in order, as its codec writes them. Codecs of channels are
    refused: the vectors of a tier are no neighbours.
    """

    tiers: tuple[Codec | None, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.tiers) <= 256:
            raise ValueError(f"{len(self.tiers)} tiers must be 1 to 256")
        for codec in self.tiers:
            if codec is not None and (codec.tokens_at_once > 1 or not codec.fixed):
                raise CodecError(
                    f"{codec} codes tokens together, or in bytes of no fixed number; a tier takes codecs of "
                    "single vectors, such as int4, turbo or none"
                )

    def __str__(self) -> str:
        return "mixed(" + "|".join("evicted" if t is None else str(t) for t in self.tiers) + ")"

    @property
    def map_bits(self) -> int:
        """Bits that say a vector's tier."""
        return (len(self.tiers) - 1).bit_length()

    def _sizes(self, counts: np.ndarray, layout: PageLayout) -> list[int]:
        """Bytes of each tier."""
        parts = zip(self.tiers, counts.tolist(), strict=True)
        return [
            0 if codec is None or not count else codec.max_bytes(_rows(count, layout))
            for codec, count in parts
        ]

    def num_bytes(self, tiers: Tensor, layout: PageLayout) -> int:
        """Count the bytes that a page with such a map takes, exactly."""
        counts = np.bincount(tiers.flatten().numpy(), minlength=len(self.tiers))
        return packed_width(layout.vectors, self.map_bits) + sum(self._sizes(counts, layout))

    def encode(self, page: Tensor, tiers: Tensor) -> np.ndarray:
        """Write a page down.

        Shape: page `[..., tokens, kv_heads, head_dim]`, tiers `[..., tokens, kv_heads]` uint8 -> `[bytes]`

        Raises:
            CodecError: if a tier's codec cannot take its vectors; a map that does not fit.
        """
        if tiers.shape != page.shape[:-1] or int(tiers.max()) >= len(self.tiers):
            raise CodecError(
                f"a map {list(tiers.shape)} with tiers up to {int(tiers.max())} does not fit a page "
                f"{list(page.shape)} and {len(self.tiers)} tiers"
            )
        which, rows = tiers.reshape(-1), page.reshape(-1, page.shape[-1])
        head = np.zeros(packed_width(which.numel(), self.map_bits), np.uint8)
        if self.map_bits:
            codes = which.to(torch.uint8).contiguous().numpy()[None]
            pack_into(codes, self.map_bits, head[None])
        parts = [head]
        for number, codec in enumerate(self.tiers):
            mine = rows[which == number]
            if codec is not None and len(mine):
                parts.append(codec.encode(mine))
        return np.concatenate(parts)

    def decode(self, data: np.ndarray, layout: PageLayout) -> tuple[Tensor, Tensor]:
        """Read a page back, and its map.

        Raises:
            CodecError: if `encode` cannot have made these bytes.
        """
        at = packed_width(layout.vectors, self.map_bits)
        if data.size < at:
            raise CodecError(f"{self}: {data.size} bytes, too few for the map of tiers")
        which = np.zeros((1, layout.vectors), np.uint8)
        if self.map_bits:
            unpack_into(np.array(data[None, :at]), self.map_bits, which)
        counts = np.bincount(which[0], minlength=len(self.tiers))
        if len(counts) > len(self.tiers) or data.size != at + sum(self._sizes(counts, layout)):
            raise CodecError(f"{self}: damaged, or another layout: {data.size} bytes")
        rows = torch.zeros(layout.vectors, layout.shape[-1], dtype=layout.dtype)
        for number, size in enumerate(self._sizes(counts, layout)):
            codec = self.tiers[number]
            if codec is not None and size:
                mine = _rows(int(counts[number]), layout)
                rows[torch.from_numpy(which[0] == number)] = codec.decode(
                    data[at : at + size], mine
                )
            at += size
        return rows.reshape(layout.shape), torch.from_numpy(which).reshape(layout.shape[:-1])


def _rows(count: int, layout: PageLayout) -> PageLayout:
    return PageLayout((count, layout.shape[-1]), layout.dtype)
