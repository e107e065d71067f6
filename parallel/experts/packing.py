"""Placements by load: experts with much to do get copies, and the copies are packed onto ranks.

Source: DeepSeek's Expert Parallelism Load Balancer (EPLB), its global policy; here no rank gets a copy twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError
from .placement import Placement


def balanced(loads: Sequence[float], ranks: int, spare: int = 0) -> Placement:
    """Place experts so that ranks have about the same rows, with ``spare`` copies on each rank beside its share.

    Raises:
        PlanError: so many slots cannot be shared out.
    """
    slots, rest = divmod(len(loads), ranks)
    slots += spare
    if rest or spare < 0 or slots > len(loads):
        because = f"cannot hold {len(loads)} experts in equal numbers with {spare} copies each"
        raise PlanError(f"ranks={ranks}", because, "use a divisor, and fewer copies")
    copies = replicated(loads, ranks, ranks * slots)
    try:
        return packed(loads, copies, ranks, slots, by_load=True)
    except StopIteration:  # the last copies found only ranks that hold one: balance the slots first
        return packed(loads, copies, ranks, slots, by_load=False)


def replicated(loads: Sequence[float], ranks: int, slots: int) -> list[int]:
    """Number of copies of each expert: the next one goes where a copy has most to do."""
    copies = [1] * len(loads)
    for _ in range(slots - len(loads)):
        most = max(
            (e for e in range(len(loads)) if copies[e] < ranks), key=lambda e: loads[e] / copies[e]
        )
        copies[most] += 1
    return copies


def packed(
    loads: Sequence[float], copies: Sequence[int], ranks: int, slots: int, by_load: bool
) -> Placement:
    """Give every copy the rank with least to do (or with most room) that has room and no copy of its expert.

    Raises:
        StopIteration: there is none left.
    """
    held: list[list[int]] = [[] for _ in range(ranks)]
    rows = [0.0] * ranks
    shares = [(load / n, e) for e, (load, n) in enumerate(zip(loads, copies, strict=True))]
    order = sorted(shares, key=lambda s: (-s[0] if by_load else -copies[s[1]], -s[0], s[1]))
    for share, e in order:
        for _ in range(copies[e]):
            free = [r for r in range(ranks) if len(held[r]) < slots and e not in held[r]]
            first = iter(
                sorted(free, key=lambda r: (rows[r] if by_load else len(held[r]), rows[r], r))
            )
            rank = next(first)
            held[rank].append(e)
            rows[rank] += share
    return Placement(len(loads), tuple(tuple(sorted(own)) for own in held))
