"""kvtc: a transform codec for cold tiers: decorrelate all channels of a layer, bits where the variance is, pack.

Calibrated once on keys (or values) of some tokens: mean and principal axes over all heads of a layer, and the bits of
each axis, which add up to what was asked. A page is projected and rounded with those bits (none: dropped); the codes of
each axis side by side go through DEFLATE, or are packed where that is shorter. Not for attention in place.

Rotary embeddings blur the axes of keys: calibrate and code keys with the embedding undone (`Rotary.undo`) where their
positions are at hand. Keep the first tokens and the newest exact, as with any lossy codec (`CodedTokens(tail=128)`).

Source: KVTC (arXiv 2511.01815).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...cuda_kernels.bits import pack_into, packed_width, unpack_into
from .allocation import allot_bits
from .codec import CodecError, PageLayout, PageToBytes, need_floats, need_length

MOST_BITS = 8  # of an axis: a byte
REACH = 4.0  # standard deviations that the codes of an axis span
HEAD_BYTES = 4


@dataclass(frozen=True, eq=False)
class Kvtc(PageToBytes):
    """One layer's basis, or one for each layer of a page.

    Shape: mean `[layers, channels]`, basis `[layers, channels, axes]`, steps and bits `[layers, axes]`, with
        channels = kv_heads * head_dim. Pages `[layers, tokens, kv_heads, head_dim]`; of one layer without the first.
    """

    name: ClassVar[str] = "kvtc"
    lossless: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    mean: Tensor
    basis: Tensor
    steps: Tensor
    bits: Tensor
    level: int = field(default=6)

    @classmethod
    def calibrate(cls, samples: Tensor, bits: float) -> Kvtc:
        """Learn from some tokens; `bits` an element on average, before DEFLATE.

        Shape: `[tokens, kv_heads, head_dim]` or `[layers, tokens, kv_heads, head_dim]`

        Raises:
            ValueError: if there are fewer than two tokens, bits out of range, or samples that are no finite numbers.
        """
        x = samples.double()
        x = (x if x.dim() == 4 else x[None]).flatten(2)
        layers, tokens, channels = x.shape
        if tokens < 2 or not 0 < bits <= MOST_BITS or not bool(x.isfinite().all()):
            raise ValueError(
                f"kvtc: bits={bits} must be over 0 and at most {MOST_BITS}, with two finite tokens or more "
                f"(there are {tokens})"
            )
        mean = x.mean(1)
        parts = []
        for layer in range(layers):
            centred = x[layer] - mean[layer]
            size, axes = torch.linalg.eigh(centred.T @ centred / tokens)
            size, axes = size.flip(0).clamp(min=0), axes.flip(1)
            found = allot_bits(size.tolist(), bits * channels, range(MOST_BITS + 1))
            given = torch.tensor(found)
            steps = REACH * size.sqrt() / torch.exp2(given - 1)
            parts.append((axes.float(), steps.clamp(min=1e-30).float(), given.to(torch.uint8)))
        basis, steps, given = (torch.stack(part) for part in zip(*parts, strict=True))
        most = int((given > 0).sum(1).max()) or 1  # axes come in order of variance, so bits fall
        return cls(mean.float(), basis[..., :most].contiguous(), steps[:, :most], given[:, :most])

    @cached_property
    def digest(self) -> str:
        """Names the numbers."""
        state = hashlib.sha256()
        for part in (self.mean, self.basis, self.steps, self.bits):
            state.update(f"{part.dtype} {list(part.shape)}".encode())
            state.update(part.contiguous().numpy().tobytes())
        return state.hexdigest()

    def __str__(self) -> str:
        return f"kvtc:digest={self.digest[:16]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kvtc) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def _tokens(self, layout: PageLayout) -> int:
        need_floats(layout, self.name)
        layers, channels = self.mean.shape
        shape = layout.shape if len(layout.shape) == 4 else (1, *layout.shape)
        if len(shape) != 4 or shape[0] != layers or shape[2] * shape[3] != channels:
            raise CodecError(
                f"kvtc: calibrated for {layers} layers of {channels} channels (heads times head_dim), the page is "
                f"{list(layout.shape)}"
            )
        return shape[1]

    @cached_property
    def _counts(self) -> list[tuple[int, int]]:
        """How many axes have so many bits: pairs of bits, from 1 on, and axes."""
        counts = torch.bincount(self.bits.flatten().long(), minlength=MOST_BITS + 1).tolist()
        return [(bits, counts[bits]) for bits in range(1, MOST_BITS + 1) if counts[bits]]

    def _packed_bytes(self, tokens: int) -> int:
        return sum(axes * packed_width(tokens, bits) for bits, axes in self._counts)

    def max_bytes(self, layout: PageLayout) -> int:
        """The bits of each axis, where DEFLATE saves nothing."""
        return HEAD_BYTES + self._packed_bytes(self._tokens(layout))

    def encode(self, page: Tensor) -> np.ndarray:
        """Project, round, pack.

        Raises:
            CodecError: if an element is infinite or not a number.
        """
        layout = PageLayout.of(page)
        self._tokens(layout)
        x = page.float().reshape(self.mean.shape[0], -1, self.mean.shape[1])
        if not bool(x.isfinite().all()):
            raise CodecError("kvtc cannot code infinities or NaN; use none for this page")
        along = torch.bmm(x - self.mean[:, None], self.basis) / self.steps[:, None]
        top = torch.exp2(self.bits.float() - 1)[:, None]
        codes = (along.floor().clamp(-top, top - 1) + top).to(torch.uint8).transpose(1, 2)
        runs = [codes[self.bits == bits].contiguous().numpy() for bits, _ in self._counts]
        packed = [_pack(run, bits) for run, (bits, _) in zip(runs, self._counts, strict=True)]
        body = b"".join(part.tobytes() for part in packed)
        short = zlib.compress(b"".join(run.tobytes() for run in runs), self.level)
        body = min(body, short, key=len)
        return np.frombuffer(len(body).to_bytes(HEAD_BYTES, "little") + body, np.uint8)

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Unpack, back to the channels: the middle of each step, the mean where there are no bits."""
        tokens = self._tokens(layout)
        if data.size < HEAD_BYTES:
            raise CodecError("kvtc: no length")
        length = int.from_bytes(data[:HEAD_BYTES].tobytes(), "little")
        need_length(data, HEAD_BYTES + length, self.name)
        along = torch.zeros(*self.bits.shape, tokens)
        for bits, run in self._runs(np.array(data[HEAD_BYTES:]), tokens):
            along[self.bits == bits] = torch.from_numpy(run).float() - (2 ** (bits - 1) - 0.5)
        along = along.transpose(1, 2) * self.steps[:, None]
        x = torch.bmm(along, self.basis.transpose(1, 2)) + self.mean[:, None]
        return x.to(layout.dtype).reshape(layout.shape)

    def _runs(self, body: np.ndarray, tokens: int) -> Iterator[tuple[int, np.ndarray]]:
        """Give the codes of the axes of each number of bits. Shape: `[axes, tokens]` uint8"""
        plain = body.size == self._packed_bytes(tokens)
        if not plain:
            raw = _inflate(body.tobytes(), tokens * sum(axes for _, axes in self._counts))
            body = np.frombuffer(bytearray(raw), np.uint8)
        at = 0
        for bits, axes in self._counts:
            size = axes * (packed_width(tokens, bits) if plain else tokens)
            run = body[at : at + size].reshape(axes, -1)
            if plain:
                packed, run = run, np.empty((axes, tokens), np.uint8)
                unpack_into(packed, bits, run)
            yield bits, run
            at += size


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    out = np.empty((codes.shape[0], packed_width(codes.shape[1], bits)), np.uint8)
    pack_into(codes, bits, out)
    return out


def _inflate(packed: bytes, count: int) -> bytes:
    """Unpack what must be `count` bytes; more are refused before they take memory."""
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(packed, count + 1)
    except zlib.error as error:
        raise CodecError(f"kvtc: {error}") from error
    if len(raw) != count or not reader.eof or reader.unused_data:
        raise CodecError(f"kvtc: not {count} codes; damaged, or another layout")
    return raw
