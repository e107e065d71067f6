"""What CUDA groups have one each of, because it rests on memory that all ranks have mapped (`symmetric.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerMemoryError

MOST_RANKS = 16
Made = TypeVar("Made")


class PerGroup(Generic[Made]):
    """What CUDA groups have one each of: made at a group's first call, or found out why not.

    State: what was made, until the process ends.
    """

    def __init__(self, name: str, make: Callable[[dist.ProcessGroup], Made]) -> None:
        self.name, self.make = name, make
        self.made: dict[dist.ProcessGroup, Made | str] = {}

    def of(self, group: dist.ProcessGroup | None, x: Tensor) -> Made | None:
        """Give a group's for tensors like `x`; None off CUDA, and where the memory cannot be had.

        Collective: the first call of a group on CUDA; see `symmetric_buffer`.

        Raises:
            RuntimeError: that first call is inside a CUDA graph capture.
        """
        if group is None or x.device.type != "cuda" or not 1 < group.size() <= MOST_RANKS:
            return None
        if group not in self.made:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"a group's first {self.name} allocates memory on all ranks, which cannot be inside a CUDA graph "
                    "capture; call it once before capturing"
                )
            self.made[group] = self.tried(group)
        found = self.made[group]
        return None if isinstance(found, str) else found

    def tried(self, group: dist.ProcessGroup) -> Made | str:
        """Make it, or say why it cannot be."""
        try:
            return self.make(group)
        except PeerMemoryError as error:
            return str(error)
