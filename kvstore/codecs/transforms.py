"""Exact changes of keys that queries mirror: rotation, balancing, sorting of channels.

    k' = f(k), q' = f*(q):  q' . k' = q . k

A codec of k' then loses less, or loses it where it matters less. Decoding gives keys as they were, so attention need
not know; an engine that reads coded keys asks `queries` instead. Rotate keys after their rotary embedding, not before.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...cuda_kernels.hadamard import rotate
from .codec import CodecError, PageLayout, PageToPage, need_floats


class Transform(PageToPage):
    """A page to page whose inverse transpose is known."""

    @abstractmethod
    def queries(self, q: Tensor) -> Tensor:
        """Change queries so that their products with changed keys are the old ones.

        Shape: `[..., kv_heads, head_dim]`, with queries of a group beside each other in a leading dim
        """


@dataclass(frozen=True)
class Hadamard(Transform):
    """Random rotation of each vector, in float32: spreads outliers over all channels.

    Source: QuaRot (arXiv 2404.00456); signs first, or a vector of one sign would meet one coordinate.
    """

    name: ClassVar[str] = "hadamard"
    lossless: ClassVar[bool] = False  # to the rounding of float32
    seed: int = 0

    def layout(self, layout: PageLayout) -> PageLayout:
        """float32 of the same shape."""
        need_floats(layout, self.name)
        return PageLayout(layout.shape, torch.float32)

    def encode(self, page: Tensor) -> Tensor:
        """Rotate."""
        return rotate(page.float(), self.seed, False)

    def decode(self, page: Tensor, layout: PageLayout) -> Tensor:
        """Rotate back."""
        return rotate(page, self.seed, True).to(layout.dtype)

    def queries(self, q: Tensor) -> Tensor:
        """The same rotation: it is orthonormal."""
        return rotate(q if q.dtype == torch.float64 else q.float(), self.seed, False)


@dataclass(frozen=True, eq=False)
class Calibrated(Transform):
    """A transform that holds numbers, one for each head and channel. Equal if they are; has no text to be read.

    Shape: `[kv_heads, head_dim]`, or `[layers, 1, kv_heads, head_dim]` for pages of all layers.
    """

    numbers: Tensor

    @cached_property
    def digest(self) -> str:
        """Names the numbers."""
        held = self.numbers.detach().cpu().contiguous()
        said = f"{self.name} {held.dtype} {list(held.shape)}".encode()
        return hashlib.sha256(
            said + held.reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()

    def __str__(self) -> str:
        return f"{self.name}:digest={self.digest[:16]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def layout(self, layout: PageLayout) -> PageLayout:
        """The same, where the numbers fit."""
        need_floats(layout, self.name)
        try:
            fits = torch.broadcast_shapes(self.numbers.shape, layout.shape) == layout.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise CodecError(
                f"{self.name}: calibrated for {list(self.numbers.shape)}, the page is {list(layout.shape)}; "
                "calibrate with this model's keys, [kv_heads, head_dim] or [layers, 1, kv_heads, head_dim]"
            )
        return layout


@dataclass(frozen=True, eq=False)
class Balancer(Calibrated):
    """Multiplies channels of keys by powers of two, so that what queries weigh more is coded finer. Exact.

    Source: the channel balancer of MiKV (arXiv 2402.18096), its factors rounded to powers of two.
    """

    name: ClassVar[str] = "balancer"
    lossless: ClassVar[bool] = True

    @classmethod
    def of(cls, q_sizes: Tensor, k_sizes: Tensor) -> Balancer:
        """Choose `sqrt(max |q| / max |k|)` for each channel.

        Shape: largest magnitudes, `[kv_heads, head_dim]`; of queries the largest of the group
        """
        ratio = q_sizes.double() / k_sizes.double()
        usable = ratio.isfinite() & (ratio > 0)
        power = torch.where(usable, ratio.where(usable, torch.ones_like(ratio)).log2() / 2, 0.0)
        return cls(torch.exp2(power.round()).float())

    def encode(self, page: Tensor) -> Tensor:
        """Multiply."""
        return page * self.numbers.to(page.dtype)

    def decode(self, page: Tensor, layout: PageLayout) -> Tensor:
        """Divide."""
        return page / self.numbers.to(page.dtype)

    def queries(self, q: Tensor) -> Tensor:
        """Divide: the products stay."""
        return q / self.numbers.to(q.dtype)


@dataclass(frozen=True, eq=False)
class KSort(Calibrated):
    """Puts channels of a head in order of their size, so that blocks hold like beside like.

    Source: K-sort (arXiv 2403.20137). Here keys are sorted as they come, after the rotary embedding, which is the
    same as sorting rows of the weights by rotary pairs beforehand.
    """

    name: ClassVar[str] = "ksort"
    lossless: ClassVar[bool] = True

    @classmethod
    def of(cls, k: Tensor) -> KSort:
        """Sort by the norm over tokens. Shape: `[tokens, kv_heads, head_dim]`"""
        return cls(k.double().norm(dim=0).sort(dim=-1, descending=True, stable=True).indices)

    def encode(self, page: Tensor) -> Tensor:
        """Sort."""
        return page.gather(-1, self.numbers.expand(page.shape))

    def decode(self, page: Tensor, layout: PageLayout) -> Tensor:
        """Put back."""
        return torch.empty_like(page).scatter_(-1, self.numbers.expand(page.shape), page)

    def queries(self, q: Tensor) -> Tensor:
        """Sort likewise."""
        return q.gather(-1, self.numbers.expand(q.shape))
