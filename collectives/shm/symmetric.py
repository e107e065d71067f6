"""Tensors that lie in memory shared by a group, so that an all-reduce needs no copy in or out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .group import ShmGroup
from .segment import HALF_PAGE, PAGE, Segment


def symmetric_empty(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, group: Any = None
) -> Tensor:
    """Make a tensor in memory that all ranks of a group see, each its own at the same place.

    `all_reduce` of the tensor, or of the same contiguous part of it on all ranks, works in place: a producer that
    writes its partial sums here has nothing copied. To other calls it is a tensor like any.

    Collective: all members, with the same shape and dtype; one all-gather of a few bytes.
    State: the memory is freed when the tensor and the group are gone.

    Raises:
        TypeError: the group is not of backend `shm`.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ShmGroup):
        raise TypeError(
            f"symmetric_empty needs a group of backend 'shm', not {group!r}; use torch.empty"
        )
    size = max(1, math.prod(shape)) * dtype.itemsize
    room = -(-size // PAGE) * PAGE + PAGE
    segment, fd = Segment.create("plait-symmetric", room)
    try:
        found = torch.empty(group.size(), 3, dtype=torch.int64)
        own = torch.tensor([os.getpid(), fd, size])
        group.all_gather_single(found, own).wait()
        bases = np.zeros(group.size(), np.int64)
        segments = [
            segment if r == group.rank() else Segment.open(pid, theirs, room)
            for r, (pid, theirs, _) in enumerate(found.tolist())
        ]
        bases[:] = [each.address + HALF_PAGE for each in segments]
        group.barrier().wait()  # all have opened it
    finally:
        os.close(fd)
    group.engine.adopt(segments, bases, size)
    flat = torch.frombuffer(segment.bytes, dtype=torch.uint8, count=size, offset=HALF_PAGE)
    return flat.view(dtype).view(*shape)
