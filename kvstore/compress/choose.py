"""From scores and numbers to kept tokens."""

from __future__ import annotations

from torch import Tensor


def order(scores: Tensor) -> Tensor:
    """Indices of the last dim from the best score to the worst; of equal scores the lowest index first.

    Raises:
        ValueError: if a score is not a number: then no order exists.
    """
    if bool(scores.isnan().any()):
        raise ValueError(
            "a score is NaN: the keys, values or queries it was made from hold NaN or infinity"
        )
    return scores.sort(dim=-1, descending=True, stable=True).indices


def keep_best(scores: Tensor, counts: Tensor) -> list[Tensor]:
    """The best tokens of each head, in the order of the text.

    Shape: scores `[kv_heads, tokens]`, counts `[kv_heads]` -> a list of `[counts[h]]` int64, ascending
    """
    ranked = order(scores)
    return [
        row[: int(count)].sort().values for row, count in zip(ranked, counts.tolist(), strict=True)
    ]
