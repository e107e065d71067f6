"""Telling traces of calls: torch's dispatcher, where a Trace listens, does not see a group written in Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..trace import Event, Trace, _sent


def traced() -> bool:
    """Say whether anything listens; this costs next to nothing."""
    return torch._C._len_torch_dispatch_stack() > 0


def tell_traces(
    group: dist.ProcessGroup, op: str, brought: Sequence[Tensor], seconds: float
) -> None:
    """Record a call, and the tensors this rank brought to it, in every Trace that is on."""
    payload = sum(x.numel() * x.element_size() for x in brought)
    shape, dtype = (tuple(brought[0].shape), brought[0].dtype) if brought else ((), "")
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Trace):
            ranks = group.size()
            axis = mode.axis_of(group) if mode.axis_of else f"group of {ranks}"
            name = str(dtype).removeprefix("torch.")
            sent = _sent(op, payload, ranks)
            mode.events.append(
                Event(op, axis, ranks, shape, name, payload, sent, seconds, mode.scope)
            )
