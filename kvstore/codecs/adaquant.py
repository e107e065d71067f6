"""adaquant: layers of a page in numbers of bits of their own; keys more than values, because their weights are larger.

    keys, values = AdaQuant.of(k_norms, v_norms, bits=4)       # codecs for K and V, bits allotted over both
    KVStore(spec, codec=KVCodec(keys, values), ...)            # or by text: "adaquant:bits=4-4-8/adaquant:bits=2-2-4"

Source: KV-AdaQuant, "Quantize What Counts" (arXiv 2502.15075): norms of the projections of keys and values as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .allocation import allot_bits
from .codec import Codec, CodecError, PageLayout, PageToBytes, need_floats, need_length
from .integers import Int2, Int3, Int4
from .scaled import Int8

WIDTHS: dict[str, type[Int2 | Int3 | Int4 | Int8]] = {
    "2": Int2, "3": Int3, "4": Int4, "8": Int8,
}  # fmt: skip


@dataclass(frozen=True)
class AdaQuant(PageToBytes):
    """`bits` says those of each layer, as `4-4-2`: int8, int4, int3, int2. Pages are `[layers, ...]`."""

    name: ClassVar[str] = "adaquant"
    lossless: ClassVar[bool] = False
    bits: str = "4"
    group: int = 32

    def __post_init__(self) -> None:
        unknown = [bits for bits in self.bits.split("-") if bits not in WIDTHS]
        if unknown:
            raise ValueError(
                f"adaquant: bits={self.bits}: {unknown[0]!r} is none of {', '.join(WIDTHS)}; write those of each "
                "layer, such as 4-4-2"
            )
        _ = self.writers  # refuses the group, if it must

    @classmethod
    def of(
        cls,
        k_norms: Sequence[float],
        v_norms: Sequence[float],
        bits: float,
        choices: Sequence[int] = (2, 3, 4, 8),
        group: int = 32,
    ) -> tuple[Codec, Codec]:
        """Allot `bits` on average over keys and values of all layers; give the codecs of both.

        Args:
            k_norms, v_norms: Frobenius norms of the weights that make keys and values, of each layer.
        """
        squares = [norm**2 for norm in (*k_norms, *v_norms)]
        found = allot_bits(squares, bits * len(squares), choices)
        halves = found[: len(k_norms)], found[len(k_norms) :]
        texts = ("-".join(f"{b:g}" for b in half) for half in halves)
        keys, values = (Codec((), cls(text, group), ()) for text in texts)
        return keys, values

    @cached_property
    def writers(self) -> tuple[PageToBytes, ...]:
        """The codec of each layer."""
        kinds = [WIDTHS[bits] for bits in self.bits.split("-")]
        return tuple(Int8() if issubclass(kind, Int8) else kind(self.group) for kind in kinds)

    def of_layer(self, number: int, layers: int) -> PageToBytes:
        """A layer's own."""
        if layers != len(self.writers):
            raise CodecError(
                f"adaquant: bits={self.bits} are those of {len(self.writers)} layers, and there are {layers}"
            )
        return self.writers[number]

    def _cuts(self, layout: PageLayout) -> tuple[PageLayout, list[int]]:
        """A layer's layout, and bytes of each layer."""
        need_floats(layout, self.name)
        if layout.shape[0] != len(self.writers):
            raise CodecError(
                f"adaquant: bits={self.bits} are those of {len(self.writers)} layers, and the page "
                f"{list(layout.shape)} has {layout.shape[0]}"
            )
        one = PageLayout(layout.shape[1:], layout.dtype)
        return one, [writer.max_bytes(one) for writer in self.writers]

    def max_bytes(self, layout: PageLayout) -> int:
        """No page takes fewer."""
        return sum(self._cuts(layout)[1])

    def encode(self, page: Tensor) -> np.ndarray:
        """Layer after layer."""
        self._cuts(PageLayout.of(page))
        pairs = zip(self.writers, page, strict=True)
        return np.concatenate([writer.encode(layer) for writer, layer in pairs])

    def decode(self, data: np.ndarray, layout: PageLayout) -> Tensor:
        """Layer after layer."""
        one, sizes = self._cuts(layout)
        need_length(data, sum(sizes), self.name)
        parts = np.split(data, np.cumsum(sizes)[:-1])
        return torch.stack(
            [w.decode(part, one) for w, part in zip(self.writers, parts, strict=True)]
        )
