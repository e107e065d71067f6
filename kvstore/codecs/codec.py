"""The codec contract: page to page, page to bytes, bytes to bytes, in that order, and the chain of them.

    codec = find_codec("int8+zstd:level=3")        # one chain; find_kv_codec("int4/int2") a chain for K, one for V
    data = codec.encode(page)                      # bytes of some length up to codec.max_bytes(layout)
    page = codec.decode(data, PageLayout.of(page))

A codec is a frozen value: its options stand in its text form, and `find_codec(str(codec)) == codec`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from ..named import Named
from .places import CodePlaces


class CodecError(StoreError, ValueError):
    """A page that a codec cannot take, or bytes that it did not make."""


class PageLayout(NamedTuple):
    """What a page is: dims `[..., tokens, kv_heads, head_dim]`; the last one is a token's vector of one head.

    Codecs that take each vector by itself need no more dims than that one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, page: Tensor) -> PageLayout:
        """The layout of a page."""
        return cls(tuple(page.shape), page.dtype)

    @property
    def numel(self) -> int:
        """Elements of a page."""
        return math.prod(self.shape)

    @property
    def vectors(self) -> int:
        """Vectors of a page, one for each token and head."""
        return math.prod(self.shape[:-1])

    @property
    def page_bytes(self) -> int:
        """Bytes of a page as it is in memory."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class CodecPart(Named):
    """What all three kinds share: a name, options, and whether every bit comes back."""

    lossless: ClassVar[bool]


class PageToPage(CodecPart):
    """Gives another page, such as one of another dtype."""

    @abstractmethod
    def layout(self, layout: PageLayout) -> PageLayout:
        """The layout of what it gives.

        Raises:
            CodecError: if it cannot take such a page.
        """

    @abstractmethod
    def encode(self, page: Tensor) -> Tensor:
        """Make the other page."""

    @abstractmethod
    def decode(self, page: Tensor, layout: PageLayout) -> Tensor:
        """Make a page of the first layout again."""


class PageToBytes(CodecPart):
    """Writes a page down. A chain has exactly one.

    `tokens_at_once` tokens are coded together: a page has a multiple of them. Coding a page is coding these runs one
    by one, so what was coded is never touched again when tokens follow (`CodedTokens`).
    """

    fixed: ClassVar[bool] = True  # every page of a layout takes `max_bytes`, no fewer

    @property
    def tokens_at_once(self) -> int:
        """Tokens that share scales: 1 unless it is a codec of channels."""
        return 1

    def for_values(self) -> PageToBytes:
        """The codec of values where this one is the keys'."""
        return self

    def of_layer(self, number: int, layers: int) -> PageToBytes:
        """The codec of one layer of so many, for caches that keep layers apart.

        Raises:
            CodecError: if it is one of another number of layers.
        """
        return self

    def sections(self, layout: PageLayout) -> tuple[int, ...] | None:
        """How bytes of pages coded together lie: a head for all of them, then part by part those of each page.

        Gives the bytes of the head, and of each part of one page; None where pages cannot be told apart.

        Args:
            layout: of one page.
        """
        return None

    def places(self, layout: PageLayout) -> CodePlaces | None:
        """How attention reads the vectors of such pages in place; None: it decodes them."""
        return None

    @abstractmethod
    def max_bytes(self, layout: PageLayout) -> int:
        """Length of the longest result.

        Raises:
            CodecError: if it cannot take such a page.
        """

    @abstractmethod
    def encode(self, page: Tensor) -> np.ndarray:
        """Write a contiguous page in host memory. Shape: -> `[bytes]` uint8."""

    @abstractmethod
    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Read it back.

        Raises:
            CodecError: if `encode` cannot have made these bytes.
        """

    def decode_into(self, data: np.ndarray, page: Tensor) -> None:
        """Read it back into a contiguous page in host memory; new memory costs as much as decoding.

        Raises:
            CodecError: as `decode`; the page may then hold anything.
        """
        page.copy_(self.decode(data, PageLayout.of(page)))


class InPlace(PageToBytes):
    """Decodes into memory that is there; float64 by way of float32."""

    @abstractmethod
    def fill(self, data: np.ndarray, page: Tensor) -> None:
        """Read as many bytes as must be into a contiguous page of 16 or 32 bits."""

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Read it back, into new memory."""
        page = torch.empty(layout.shape, dtype=layout.dtype)
        self.decode_into(data, page)
        return page

    def decode_into(self, data: np.ndarray, page: Tensor) -> None:
        """Read it back."""
        layout = PageLayout.of(page)
        need_length(data, self.max_bytes(layout), self.name)
        if page.dtype != torch.float64:
            self.fill(readable(data), page)
            return
        narrow = torch.empty(page.shape)
        self.fill(readable(data), narrow)
        page.copy_(narrow)


class BytesToBytes(CodecPart):
    """Makes bytes fewer. Always lossless."""

    lossless = True

    @abstractmethod
    def max_bytes(self, length: int) -> int:
        """Length of the longest result for so many bytes."""

    @abstractmethod
    def encode(self, data: np.ndarray) -> np.ndarray:
        """Make them fewer."""

    @abstractmethod
    def decode(self, data: np.ndarray, max_bytes: int) -> np.ndarray:
        """Make them what they were, at most `max_bytes`: damaged bytes cannot ask for more memory.

        Raises:
            CodecError: if `encode` cannot have made these bytes.
        """


@dataclass(frozen=True)
class Codec:
    """A chain: pages to pages, one page to bytes, bytes to bytes."""

    pages: tuple[PageToPage, ...]
    writer: PageToBytes
    packers: tuple[BytesToBytes, ...]

    def __str__(self) -> str:
        return "+".join(map(str, (*self.pages, self.writer, *self.packers)))

    @property
    def lossless(self) -> bool:
        """Whether every bit of a page comes back."""
        return all(part.lossless for part in (*self.pages, self.writer, *self.packers))

    @property
    def tokens_at_once(self) -> int:
        """Tokens that are coded together: pages hold a multiple of them."""
        return self.writer.tokens_at_once

    @property
    def fixed(self) -> bool:
        """Whether every page of a layout takes exactly `max_bytes`."""
        return self.writer.fixed and not self.packers

    def for_values(self) -> Codec:
        """The codec of values where this one is the keys': another one for KIVI, say."""
        return replace(self, writer=self.writer.for_values())

    def of_layer(self, number: int, layers: int) -> Codec:
        """As of the writer."""
        return replace(self, writer=self.writer.of_layer(number, layers))

    def sections(self, layout: PageLayout) -> tuple[int, ...] | None:
        """As of the writer; None where something packs its bytes."""
        return None if self.packers else self.writer.sections(self._layouts(layout)[-1])

    def some_pages(
        self, data: np.ndarray, layout: PageLayout, index: np.ndarray | slice
    ) -> np.ndarray:
        """Bytes of some of the pages that were coded together, as those alone would be coded with the same head.

        Args:
            data: of pages `[pages, ...]`; layout: of one of them; index: `[n]` which, or a slice of them.

        Raises:
            CodecError: if they cannot be told apart.
        """
        sizes = self.sections(layout)
        if sizes is None:
            raise CodecError(f"{self}: pages that were coded together cannot be decoded apart")
        pages = (data.size - sizes[0]) // sum(sizes[1:])
        ends = sizes[0] + pages * np.cumsum((0, *sizes[1:]))
        parts = [data[a:b].reshape(pages, -1)[index] for a, b in pairwise(ends)]
        return np.concatenate([data[: sizes[0]], *(part.reshape(-1) for part in parts)])

    def _layouts(self, layout: PageLayout) -> list[PageLayout]:
        layouts = [layout]
        for part in self.pages:
            layouts.append(part.layout(layouts[-1]))
        return layouts

    def _limits(self, layout: PageLayout) -> list[int]:
        limits = [self.writer.max_bytes(self._layouts(layout)[-1])]
        for part in self.packers:
            limits.append(part.max_bytes(limits[-1]))
        return limits

    def max_bytes(self, layout: PageLayout) -> int:
        """Length of the longest result: what a tier's slots must hold.

        Raises:
            CodecError: if the chain cannot take such a page.
        """
        return self._limits(layout)[-1]

    def encode(self, page: Tensor) -> np.ndarray:
        """Write a page down. Shape: -> `[bytes]` uint8.

        Raises:
            CodecError: if the chain cannot take it.
        """
        self.max_bytes(PageLayout.of(page))
        page = page.detach().cpu()
        for part in self.pages:
            page = part.encode(page)
        data = self.writer.encode(page.contiguous())
        for part in self.packers:
            data = part.encode(data)
        return data

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Read a page of this layout back, exactly if `lossless`.

        Raises:
            CodecError: if `encode` cannot have made these bytes of such a page.
        """
        return self._unpage(
            self.writer.decode(self._unpack(data, layout), self._layouts(layout)[-1]), layout
        )

    def decode_into(self, data: np.ndarray, page: Tensor) -> None:
        """Read a page back into memory that is there.

        Raises:
            CodecError: as `decode`; the page may then hold anything.
        """
        if self.pages or not page.is_contiguous() or page.device.type != "cpu":
            page.copy_(self.decode(data, PageLayout.of(page)))
        else:
            self.writer.decode_into(self._unpack(data, PageLayout.of(page)), page)

    def _unpack(self, data: np.ndarray, layout: PageLayout) -> np.ndarray:
        if not self.packers:
            return data
        limits = self._limits(layout)
        for part, limit in zip(self.packers[::-1], limits[-2::-1], strict=True):
            data = part.decode(data, limit)
        return data

    def _unpage(self, page: Tensor, layout: PageLayout) -> Tensor:
        for part, before in zip(self.pages[::-1], self._layouts(layout)[-2::-1], strict=True):
            page = part.decode(page, before)
        return page


@dataclass(frozen=True)
class KVCodec:
    """The codecs of keys and of values: one text for both (`"kivi:bits=2"`), or two (`"int4/int2"`)."""

    keys: Codec
    values: Codec

    def __str__(self) -> str:
        alone = self.keys.for_values() == self.values
        return str(self.keys) if alone else f"{self.keys}/{self.values}"

    def of_layer(self, number: int, layers: int) -> KVCodec:
        """As of both."""
        return KVCodec(self.keys.of_layer(number, layers), self.values.of_layer(number, layers))

    @property
    def lossless(self) -> bool:
        """Whether every bit of keys and values comes back."""
        return self.keys.lossless and self.values.lossless


def bits_per_element(num_bytes: int, layout: PageLayout) -> float:
    """What an element really takes, scales and headers included."""
    return 8 * num_bytes / layout.numel


def need_floats(layout: PageLayout, name: str) -> None:
    """Raise unless a page holds floating point numbers.

    Raises:
        CodecError: saying what it holds.
    """
    if not layout.dtype.is_floating_point or not layout.numel or not layout.shape:
        raise CodecError(
            f"{name} cannot code a page {list(layout.shape)} of {layout.dtype}; use none"
        )


def readable(data: np.ndarray) -> np.ndarray:
    """Give bytes as compiled kernels take them: read-only ones are copied."""
    return data if data.flags.writeable else data.copy()


def need_length(data: np.ndarray, length: int, name: str) -> None:
    """Raise unless the bytes are as many as they must be.

    Raises:
        CodecError: saying how many they are.
    """
    if data.size != length:
        raise CodecError(
            f"{name}: {data.size} bytes where a page takes {length}; damaged, or another layout"
        )


def tensor_bytes(page: Tensor) -> np.ndarray:
    """See a contiguous tensor as bytes. Shape: `[...]` -> `[bytes]` uint8."""
    return page.reshape(-1).view(torch.uint8).numpy()


def bytes_tensor(data: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Copy bytes into a new flat tensor. Shape: `[bytes]` -> `[elements]`."""
    return torch.from_numpy(np.array(data, np.uint8)).view(dtype)
