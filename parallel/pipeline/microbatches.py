"""A batch in equal pieces, so that their losses and gradients add up to the whole batch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import ignored_label


def microbatches(values: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Cut every argument that has the batch's rows; a last short piece is filled with rows that do not count.

    Shape: [batch, ...] -> count of [ceil(batch/count), ...]
    """
    batch = values["labels"].shape[0]
    rows = -(-batch // count)
    every = torch.arange(rows * count, device=values["labels"].device)
    filled = every >= batch
    every = every.clamp(max=batch - 1)
    cut: dict[str, tuple[Tensor, ...]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
            whole = value[every.to(value.device)]
            if name in {"labels", "shift_labels"}:
                whole[filled.to(whole.device)] = ignored_label(values)
            cut[name] = whole.split(rows)
    return [{**values, **{name: parts[i] for name, parts in cut.items()}} for i in range(count)]
