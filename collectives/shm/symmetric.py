"""Tensors that lie in memory shared by a group, so that an all-reduce needs no copy in or out."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BackendUnavailable, PeerMemoryError
from .group import ShmGroup
from .segment import HALF_PAGE, PAGE, Segment

MOST = (1 << 63) - 1  # that a message can say


def symmetric_empty(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, group: Any = None
) -> Tensor:
    """Make a tensor in memory that all ranks of a group see, each its own at the same place.

    `all_reduce` of the tensor, or of the same contiguous part of it on all ranks, works in place: a producer that
    writes its partial sums here has nothing copied. To other calls it is a tensor like any.

    Collective: all members, with the same shape and dtype; two all-gathers of a few bytes.
    State: the memory is freed when the tensor and the group are gone.

    Raises:
        TypeError: the group is not of backend `shm`.
        ValueError: a size below 0.
        PeerMemoryError: on every rank alike: ranks ask for different sizes, or one cannot have or map so much.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ShmGroup):
        raise TypeError(
            f"symmetric_empty needs a group of backend 'shm', not {group!r}; use torch.empty"
        )
    if any(length < 0 for length in shape):
        raise ValueError(f"symmetric_empty: {list(shape)} has a size below 0")
    size = max(1, math.prod(shape)) * dtype.itemsize
    room = -(-size // PAGE) * PAGE + PAGE
    segment, fd = _tried(room)
    try:
        told = _tell(group, os.getpid(), fd, min(size, MOST))
        _check(told)
        assert segment is not None
        segments, refused = _opened(told, segment, group.rank(), room)
        _check_opened(_tell(group, refused))  # all have opened it
    finally:
        if fd >= 0:
            os.close(fd)
    bases = np.array([each.address + HALF_PAGE for each in segments])
    group.engine.adopt(segments, bases, size)
    flat = torch.frombuffer(segment.bytes, dtype=torch.uint8, count=size, offset=HALF_PAGE)
    return flat.view(dtype).view(*shape)


def _tell(group: ShmGroup, *numbers: int) -> list[list[int]]:
    """Exchange a few numbers; gives those of all ranks."""
    found = torch.empty(group.size(), len(numbers), dtype=torch.int64)
    group.all_gather_single(found, torch.tensor(numbers)).wait()
    return found.tolist()


def _tried(room: int) -> tuple[Segment | None, int]:
    """Make a segment; where the system refuses, give what it said as a number below 0 for the file."""
    try:
        return Segment.create("plait-symmetric", room)
    except OverflowError:  # more than an address can count
        return None, -errno.ENOMEM
    except OSError as error:
        return None, -(error.errno or errno.ENOMEM)


def _opened(told: list[list[int]], own: Segment, rank: int, room: int) -> tuple[list[Segment], int]:
    """Map all ranks' segments; where the system refuses, give what it said as a number, else 0."""
    segments: list[Segment] = []
    try:
        for r, (pid, fd, _) in enumerate(told):
            segments.append(own if r == rank else Segment.open(pid, fd, room))
    except (OSError, BackendUnavailable) as error:
        system = error if isinstance(error, OSError) else error.__cause__
        return [], getattr(system, "errno", None) or errno.ENOMEM
    return segments, 0


def _check_opened(told: list[list[int]]) -> None:
    for rank, (refused,) in enumerate(told):
        if refused:
            raise PeerMemoryError(
                f"symmetric_empty: rank {rank} cannot map the other ranks' memory: {os.strerror(refused)}; "
                "ask for less, or use torch.empty"
            )


def _check(told: list[list[int]]) -> None:
    sizes = [size for _, _, size in told]
    if len(set(sizes)) > 1:
        raise PeerMemoryError(
            f"symmetric_empty: ranks ask for {sizes} bytes; give the same shape and dtype on all"
        )
    for rank, (_, fd, size) in enumerate(told):
        if fd < 0:
            raise PeerMemoryError(
                f"symmetric_empty: rank {rank} cannot have {size} bytes of shared memory: {os.strerror(-fd)}; "
                "ask for less, or use torch.empty"
            )
