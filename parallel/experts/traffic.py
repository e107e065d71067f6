"""What a placement makes of recorded tokens: how even the ranks' work is, and what crosses between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...collectives.primitive import chunk_sizes
from .placement import Placement
from .routing import Routing


@dataclass(frozen=True)
class Traffic:
    """Of one layer.

    Attributes:
        predicted: rows of the busiest rank over the mean, if copies of an expert share its rows evenly.
        measured: the same as the dispatcher spreads these tokens.
        sent_rows: rows that leave their rank on the way to their experts; as many come back.
        hop_rows: rows whose expert is on another rank than the one of the layer before: what would cross if tokens
            went from expert to expert without coming back.
    """

    predicted: float
    measured: float
    sent_rows: int
    hop_rows: int


def imbalance(rows: torch.Tensor) -> float:
    """The most over the mean; 1 where there is nothing to do."""
    return float(rows.max() / rows.double().mean()) if rows.sum() else 1.0


def predicted(loads: torch.Tensor, placement: Placement) -> float:
    """The imbalance that a placement has by the loads it is made from."""
    shares = [float(load) / len(home) for load, home in zip(loads, placement.homes, strict=True)]
    return imbalance(torch.tensor([sum(shares[e] for e in own) for own in placement.ranks]))


def weigh(
    routing: Routing, placements: Mapping[str, Placement], made_from: Routing | None = None
) -> dict[str, Traffic]:
    """Weigh placements by recorded tokens, shared out over the ranks in order.

    Args:
        made_from: what the placements are made from, for the prediction; default the same tokens.
    """
    found: dict[str, Traffic] = {}
    before: torch.Tensor | None = None
    for layer, placement in placements.items():
        chosen = routing.chosen[layer]
        # of a slot; of a dropped pair nobody
        rank_of = torch.tensor([r for r, own in enumerate(placement.ranks) for _ in own] + [-1])
        home = torch.cat(
            [
                torch.full((n,), r)
                for r, n in enumerate(chunk_sizes(len(chosen), len(placement.ranks)))
            ]
        )
        parts = [placement.spread(chosen[home == r], r) for r in range(len(placement.ranks))]
        at = rank_of[torch.cat(parts)]
        rows = torch.bincount(at[at >= 0], minlength=len(placement.ranks))
        hops = 0
        if before is not None and len(before) == len(at):
            pairs = before[:, :, None] != at[:, None, :]
            hops = int(pairs.sum() // before.shape[1])
        loads = (made_from or routing).loads(layer)
        found[layer] = Traffic(
            predicted(loads, placement),
            imbalance(rows),
            int(((at != home[:, None]) & (at >= 0)).sum()),
            hops,
        )
        before = at
    return found
