"""`trace`: what a model's ranks send, by the names of its axes."""

from __future__ import annotations

from torch import nn

from ..collectives import Trace
from .api import Parallelized


def trace(model: nn.Module | None = None) -> Trace:
    """Record every collective inside ``with plait.trace(model) as trace:``, forward and backward, of this rank.

    Args:
        model: what ``parallelize`` returned, also inside a wrapper (DDP, ``torch.compile``): its groups are named by
            their axes, ``tp``, ``kvp``, ``ep``. Others, and all without a model, by their size: ``group of 2``.
    """
    for module in () if model is None else model.modules():
        done = getattr(module, "_plait", None)
        if isinstance(done, Parallelized):
            return Trace(done.ranks.groups.axis_of)
    return Trace()
