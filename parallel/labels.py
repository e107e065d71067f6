"""Labels of a causal language model: which token each one is for, and how many the loss is a mean over."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that transformers' losses leave out


def ignored_label(values: dict[str, Any]) -> int:
    """Give the label that a forward's loss leaves out."""
    return values.get("ignore_index", IGNORED)


def shifted_labels(values: dict[str, Any]) -> Tensor:
    """Give each token the label it predicts: its successor's, or what the caller shifted himself.

    Shape: labels [batch, seq] -> [batch, seq]
    """
    shifted = values.get("shift_labels")
    if shifted is None:
        shifted = F.pad(values["labels"], (0, 1), value=ignored_label(values))[..., 1:]
    return shifted


def item_count(values: dict[str, Any]) -> Any:
    """Count the tokens that the whole batch's loss is a mean over; every part of it divides its sum by that."""
    given = values.get("num_items_in_batch")
    return (shifted_labels(values) != ignored_label(values)).sum() if given is None else given
