"""What crosses from one chunk of layers to the next, told to torch's pipelining before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PlanError


@dataclass(frozen=True)
class Meta:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Meta:
        """Read them off a tensor."""
        return cls(tuple(x.shape), x.dtype)

    @property
    def travels(self) -> torch.dtype:
        """The dtype it travels in: autograd knows no whole numbers, and float64 holds 53 bits of them."""
        return self.dtype if self.dtype.is_floating_point else torch.float64


@dataclass(frozen=True)
class Wire:
    """The tensors that cross, of every microbatch. torch wants one shape for all: uneven ones travel flat, filled up.

    Args:
        each: of every microbatch, its tensors; the same number and dtypes for all.
    """

    each: tuple[tuple[Meta, ...], ...]

    def buffers(self) -> list[Tensor]:
        """What travels, on meta."""
        return [
            torch.empty(shape, dtype=meta.travels, device="meta", requires_grad=True)
            for shape, meta in zip(self._shapes(), self.each[0], strict=True)
        ]

    def pack(self, number: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make the buffers of a microbatch.

        Raises:
            PlanError: a tensor is not what the next stage was told.
        """
        packed = []
        for x, meta, shape in zip(tensors, self.each[number], self._shapes(), strict=True):
            if Meta.of(x) != meta:
                raise PlanError(
                    f"{list(x.shape)} {x.dtype} to the next stage",
                    f"is not the {list(meta.shape)} {meta.dtype} that it was told of",
                    "let all layers return what the first returns, in one dtype",
                )
            x = x.to(meta.travels)
            if shape != meta.shape:
                x = F.pad(x.reshape(-1), (0, shape[0] - x.numel()))
            x = x.contiguous()
            # Zero-bubble schedules detach what they have differentiated in place, which no view lets them do.
            packed.append(x.clone() if x._is_view() else x)
        return tuple(packed)

    def unpack(self, number: int, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `pack`."""
        tensors = []
        for x, meta, shape in zip(buffers, self.each[number], self._shapes(), strict=True):
            if x.requires_grad:
                x.register_hook(lambda grad: grad.contiguous())  # what travels must be
            if shape != meta.shape:
                x = x[: prod(meta.shape)].view(meta.shape)
            tensors.append(x.to(meta.dtype))
        return tensors

    def _shapes(self) -> list[tuple[int, ...]]:
        found = []
        for metas in zip(*self.each, strict=True):
            shapes = {meta.shape for meta in metas}
            found.append(shapes.pop() if len(shapes) == 1 else (max(map(prod, shapes)),))
        return found
