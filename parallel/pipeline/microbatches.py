"""A batch in pieces, whose losses and gradients add up to the whole batch's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a batch.

    Attributes:
        values: the arguments of the forward.
        rows: how many rows they have.
        share: of the batch; 0 for a row that only fills up, where there are fewer rows than microbatches.
        weight: by which its loss is multiplied, where the forward does not do that.
    """

    values: dict[str, Any]
    rows: int
    share: float
    weight: Any = 1.0


def microbatches(
    values: dict[str, Any],
    batch: int,
    count: int,
    whole: Collection[str] = (),
    ignored: int | None = None,
) -> list[Microbatch]:
    """Cut every argument that has the batch's rows, but those that stay whole; pieces differ by a row at most.

    There are always so many pieces: ranks whose experts meet must run equally many, whatever batches they have. What
    fills up has the label that is ignored, where there is one.

    Shape: [batch, ...] -> count of [batch/count, ...]
    """
    size, more = divmod(batch, count)
    pieces, at = [], 0
    for number in range(count):
        rows = size + (number < more)
        part = slice(at, at + rows) if rows else slice(1)

        def own(x: Tensor, part: slice = part) -> Tensor:
            return x[part] if x.dim() > 0 and x.shape[0] == batch else x

        cut = {n: tree_map_only(Tensor, own, v) for n, v in values.items() if n not in whole}
        for name in {"labels", "shift_labels"} & cut.keys() if ignored is not None else ():
            if not rows and isinstance(cut[name], Tensor):
                cut[name] = cut[name].new_full(cut[name].shape, ignored)
        pieces.append(Microbatch({**values, **cut}, rows or 1, rows / batch))
        at += rows
    return pieces
