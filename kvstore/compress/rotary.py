"""Rotary embeddings, done and undone: scorers that predict queries look at keys as they were before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """The angles of a rotary embedding of the usual kind: dim f is paired with dim f + width / 2.

    Shape: frequencies `[width / 2]`, radians per position; the first `width` dims of a head are rotated.
    """

    frequencies: Tensor
    scale: float = 1.0

    @property
    def width(self) -> int:
        """Dims of a head that are rotated; those after them are not."""
        return 2 * self.frequencies.numel()

    def angles(self, positions: Tensor) -> Tensor:
        """Angles of positions. Shape: `[n]` -> `[n, width / 2]` float64."""
        return positions.double()[:, None] * self.frequencies.double()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors to their positions. Shape: x `[..., n, head_dim]`, positions `[n]`."""
        return self._turn(x, self.angles(positions), self.scale)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return self._turn(x, -self.angles(positions), 1 / self.scale)

    def _turn(self, x: Tensor, angles: Tensor, scale: float) -> Tensor:
        cos, sin = (f(angles).to(x.dtype) * scale for f in (torch.cos, torch.sin))
        half = self.width // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
