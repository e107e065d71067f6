"""The order of rows by expert: pairs of a token and a choice, one expert's after another's, and how many each has."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .kernel_cache import njit
from .merge import direct


def sort_by_expert_reference(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of tokens and choices by expert, pairs of one expert by number, in plain torch.

    Pairs of expert number ``experts`` are nobody's: they come last and are not counted.

    Shape: index `[tokens, top_k]` (int64) -> order `[tokens * top_k]`, counts `[experts]`
    """
    flat = index.reshape(-1)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    counts = counts.index_add(0, flat, torch.ones_like(flat))  # bincount would wait for a GPU
    return torch.argsort(flat, stable=True), counts[:experts]


@njit(nogil=True)
def _sort(flat, order, counts):
    """Sort by counting: two passes over the pairs. A number out of range is told by its place, -1 if there is none."""
    experts = counts.shape[0] - 1
    for i in range(flat.shape[0]):
        if flat[i] < 0 or flat[i] > experts:
            return i
        counts[flat[i]] += 1
    nexts = np.empty(experts + 1, np.int64)
    total = 0
    for e in range(experts + 1):
        nexts[e] = total
        total += counts[e]
    for i in range(flat.shape[0]):
        order[nexts[flat[i]]] = i
        nexts[flat[i]] += 1
    return -1


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of tokens and choices by expert, pairs of one expert by number; count each expert's.

    Pairs of expert number ``experts`` are nobody's: they come last and are not counted.

    Shape: index `[tokens, top_k]` (int64) -> order `[tokens * top_k]`, counts `[experts]`

    Raises:
        ValueError: an expert below 0 or above ``experts`` (seen on the CPU only).
    """
    if not direct(index):
        return sort_by_expert_reference(index, experts)
    flat = index.reshape(-1).numpy()
    order, counts = np.empty(len(flat), np.int64), np.zeros(experts + 1, np.int64)
    wrong = _sort(flat, order, counts)
    if wrong >= 0:
        token, choice = divmod(wrong, index.shape[1])
        raise ValueError(
            f"sort_by_expert: token {token} chose expert {flat[wrong]} (choice {choice}), "
            f"and there are {experts}; was the router's answer finite?"
        )
    return torch.from_numpy(order), torch.from_numpy(counts[:experts])


__all__ = ["sort_by_expert", "sort_by_expert_reference"]
