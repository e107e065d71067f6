"""Differentiable collectives. Each forward stands beside its backward, which is the forward of its partner.

Two kinds of tensors pass through a parallel region: *replicated* ones (every rank holds the whole value and the
whole gradient) and *partial* ones (the ranks' values, or gradients, sum to the whole).
"""

from ..primitive import chunk_sizes
from .parts import (
    all_to_all,
    gather,
    gather_sequence,
    own_part,
    scatter_sequence,
    split,
    split_rows,
)
from .regions import enter, enter_rows, land, leave, leave_later, needs_grad

__all__ = [
    "all_to_all",
    "chunk_sizes",
    "enter",
    "enter_rows",
    "gather",
    "gather_sequence",
    "land",
    "leave",
    "leave_later",
    "needs_grad",
    "own_part",
    "scatter_sequence",
    "split",
    "split_rows",
]
