"""Kernels of the host for tensors of any device: what the codecs' operators run where no CUDA kernel does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .numbers import bits_of


def coded_on_host(
    fill: Callable[..., Any], x: Tensor, rooms: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Any]:
    """Call `fill(x, *arrays)` with arrays like `rooms`; give those as tensors on x's device, and what it said."""
    parts = [torch.empty_like(room, device="cpu") for room in rooms]
    said = fill(x.detach().cpu().contiguous(), *map(bits_of, parts))
    return tuple(part.to(x.device) for part in parts), said


def decoded_on_host(
    fill: Callable[..., Any], parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Call `fill(*arrays, x)` on the parts of a code and an empty x; give x on their device."""
    x = torch.empty(*shape, dtype=dtype)
    fill(*(bits_of(part.cpu().contiguous()) for part in parts), x)
    return x.to(parts[0].device)


def by_way_of_host(operator: Any, given: Sequence[Tensor], *args: Any) -> Any:
    """Call an operator on copies in host memory, and bring back what it makes."""
    made = operator(*(t.cpu() for t in given), *args)
    device = given[0].device
    return made.to(device) if isinstance(made, Tensor) else tuple(t.to(device) for t in made)
